{{/* Labels of every object; the version is on those that people look at. */}}
{{- define "keystone-mesh.labels" -}}
app.kubernetes.io/part-of: keystone-mesh
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{/* What selects the pods of a part, and never changes. */}}
{{- define "keystone-mesh.agent.selector" -}}
app.kubernetes.io/name: keystone-mesh
app.kubernetes.io/component: agent
{{- end }}
{{- define "keystone-mesh.controller.selector" -}}
app.kubernetes.io/name: keystone-mesh
app.kubernetes.io/component: controller
{{- end }}

{{- define "keystone-mesh.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Where the API server is, for pods that run before the service network does. client-go and kube-rs read these. */}}
{{- define "keystone-mesh.apiServer" -}}
{{- with .Values.apiServer.host }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ . | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ $.Values.apiServer.port | quote }}
{{- end }}
{{- end }}

{{/*
An API token of our own choice of life, where in-cluster clients look for it. Takes the context and the life in seconds.
*/}}
{{- define "keystone-mesh.token" -}}
name: api-access
projected:
  defaultMode: {{ .mode }}
  sources:
    - serviceAccountToken: {path: token, expirationSeconds: {{ .seconds }}}
    - configMap:
        name: kube-root-ca.crt
        items: [{key: ca.crt, path: ca.crt}]
    - downwardAPI:
        items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]
{{- end }}

{{/*
The annotations that a node's daemon writes: `Writer::Node` of the contract (docs/annotations.md), as a CEL list. A test
holds the list to the code.
*/}}
{{- define "keystone-mesh.recordKeys" -}}
[
  {{- range $at, $key := list "endpoints" "identity" "key-proof" "nat" "public-key" "relay" "routes-wanted" "seq" "signature" "version" }}
  {{- if $at }}, {{ end -}}
  'mesh.keystone.cluster/{{ $key }}'
  {{- end -}}
]
{{- end }}

{{/* Whether daemons enforce network policies: they do where the mesh is the pods' network. */}}
{{- define "keystone-mesh.enforces" -}}
{{- if and (eq .Values.cni.mode "pod-network") .Values.cni.networkPolicy }}true{{ end }}
{{- end }}

{{/*
What the agent needs to keep the host's CNI directories, and only where a mode is set: their places in the pod, and with the
pods' network in our hands the host's switches for forwarding, which a container otherwise sees read-only.
*/}}
{{- define "keystone-mesh.cni.env" -}}
{{- with .Values.cni }}
{{- if .mode }}
- {name: KEYSTONE_MESH_CNI_MODE, value: {{ .mode }}}
- {name: KEYSTONE_MESH_CNI_CONF_DIR, value: /host/cni/net.d}
- {name: KEYSTONE_MESH_CNI_BIN_DIR, value: /host/cni/bin}
{{- if ne $.Values.agent.runDir "/run/keystone-mesh" }}
- {name: KEYSTONE_MESH_CNI_FACTS, value: {{ $.Values.agent.runDir }}/pods.json}
{{- end }}
{{- end }}
{{- if include "keystone-mesh.enforces" $ }}
- {name: KEYSTONE_MESH_NETWORK_POLICY, value: "true"}
{{- end }}
{{- if ne (toString .podRoutes) "<nil>" }}
- {name: KEYSTONE_MESH_POD_ROUTES, value: {{ .podRoutes | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- define "keystone-mesh.cni.mounts" -}}
{{- with .Values.cni }}
{{- if .mode }}
- {name: cni-configurations, mountPath: /host/cni/net.d}
{{- end }}
{{- if has .mode (list "pod-network" "helper") }}
- {name: cni-plugins, mountPath: /host/cni/bin}
{{- end }}
{{- if eq .mode "pod-network" }}
- {name: sysctl, mountPath: /host/proc/sys/net}
{{- end }}
{{- end }}
{{- end }}
{{- define "keystone-mesh.cni.volumes" -}}
{{- with .Values.cni }}
{{- if .mode }}
- name: cni-configurations
  hostPath: {path: {{ .confDir }}, type: DirectoryOrCreate}
{{- end }}
{{- if has .mode (list "pod-network" "helper") }}
- name: cni-plugins
  hostPath: {path: {{ .binDir }}, type: DirectoryOrCreate}
{{- end }}
{{- if eq .mode "pod-network" }}
- name: sysctl
  hostPath: {path: /proc/sys/net, type: Directory}
{{- end }}
{{- end }}
{{- end }}

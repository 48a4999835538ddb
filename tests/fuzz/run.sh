#!/bin/sh
# Fuzzes: ./run.sh SECONDS [TARGET...]
#
# Builds once, then runs each target (all, where none is named) for SECONDS, one after another, one job each. Prints a
# table at the end. Exits with 1 on a finding; its input is in artifacts/TARGET/. What the fuzzer learns is kept in the
# target directory, the seeds in corpus/ stay as they are.
set -u
cd "$(dirname "$0")" || exit 2

case "${1:-}" in
'' | *[!0-9]*)
    echo "usage: $0 SECONDS [TARGET...]    targets: $(cargo fuzz list --fuzz-dir . | tr '\n' ' ')" >&2
    exit 2
    ;;
esac
seconds=$1
shift
[ $# -gt 0 ] || set -- $(cargo fuzz list --fuzz-dir .)

# One target named means one target built.
[ $# -eq 1 ] && only=$1 || only=
cargo fuzz build --fuzz-dir . $only || exit 2

learned=${CARGO_TARGET_DIR:-target}/corpus
logs=${CARGO_TARGET_DIR:-target}/logs
mkdir -p "$logs"
table=
found=0
for target in "$@"; do
    mkdir -p "$learned/$target"
    log=$logs/$target.log
    start=$(date +%s)
    # 5 s for one input is a finding too: no decoder needs it.
    cargo fuzz run --fuzz-dir . "$target" "$learned/$target" "corpus/$target" -- \
        -max_total_time="$seconds" -timeout=5 -print_final_stats=1 >"$log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
    findings=0
    if [ $status -ne 0 ]; then
        findings=1
        found=1
        echo "--- $target" >&2
        grep -a -o 'Test unit written to .*' "$log" >&2
        grep -a -A 60 -m 1 -E '^(thread|==[0-9]+==|error)' "$log" >&2 || tail -n 60 "$log" >&2
    fi
    row=$(printf '%-18s %12s %8s %9s' "$target" "${runs:--}" $(($(date +%s) - start)) $findings)
    echo "$row"
    table="$table$row
"
done
printf '\n%-18s %12s %8s %9s\n%s' target executions seconds findings "$table"
exit $found

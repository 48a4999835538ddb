use keystone_mesh_core::policy::Pod;

use super::*;

fn work(compile: Compile) -> Work {
    let mut store = Store::default();
    store.cluster.pods.insert(("default".into(), "web".into()), Pod::default());
    Work {
        node: "home".to_owned(),
        pace: Pace::default(),
        seed: 1,
        said: Arc::default(),
        store: Arc::new(store),
        compile,
        own: Vec::new(),
        kernel: None,
        heard: Heard { pods: true, namespaces: true, policies: true, node: true },
        changed: true,
        due: Some(Instant::now()),
        failures: 0,
    }
}

#[tokio::test]
async fn a_round_that_panics_loses_nothing_of_what_was_heard() {
    let mut work = work(|_, _, _| panic!("a fault of ours"));
    for failures in 1..3 {
        let began = Instant::now();
        work.enforce().await;
        assert_eq!(work.store.cluster.pods.len(), 1, "the next round compiles the same cluster");
        assert!(work.changed && work.due.is_some_and(|due| due > began), "and comes after a pause");
        assert_eq!((work.failures, Arc::strong_count(&work.store)), (failures, 1));
    }
    let said = work.said.lock().unwrap().clone();
    assert_eq!((said.status.state.as_str(), said.status.errors), ("failed", 2));
    assert!(said.refused.is_some_and(|why| why.contains("a fault of ours")));
}

/// Stands for a round of a large cluster.
fn slow(cluster: &Cluster, node: &str, own: &[IpNet]) -> Compiled {
    STARTED.notify_one();
    std::thread::sleep(Duration::from_millis(200));
    ENDED.store(true, std::sync::atomic::Ordering::SeqCst);
    let _ = compile(cluster, node, own);
    // Nothing is to be written by this test.
    panic!("on purpose");
}

static STARTED: Notify = Notify::const_new();
static ENDED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

#[tokio::test]
async fn an_enforcer_that_is_stopped_ends_after_the_round_that_is_under_way() {
    let (_access, follow) = watch::channel(None);
    let (work, stop, said) = (work(slow), Arc::<Notify>::default(), Arc::default());
    let stopped = stop.clone();
    let task = tokio::spawn(async move { work.run(follow, &stopped).await });
    let enforcer = Enforcer { task, stop, said };
    STARTED.notified().await;
    enforcer.stop().await;
    assert!(ENDED.load(std::sync::atomic::Ordering::SeqCst), "nothing is under way after the stop");
}

//! A lab whose supervisor is killed: what is left is found and removed, at any moment of its life.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{ASK, CART, TestLab, until};

fn assert_answers(lab: &TestLab) {
    let done = lab.exec("deploy/cart", &ASK);
    assert_eq!((done.code, done.stdout.as_str()), (0, "hello\n"), "{}", done.stderr);
}

#[test]
fn a_lab_that_crashed_is_taken_down_and_comes_up_again_beside_another() {
    let (Some(lab), Some(neighbour)) = (TestLab::new(), TestLab::new()) else { return };
    neighbour.up(CART, &["--nodes", "2"]);
    lab.up(CART, &["--nodes", "2"]);
    lab.crash();
    assert!(!lab.namespaces().is_empty());

    // The name is still taken: nothing of the crashed lab is used by mistake.
    let again = lab.run("up", &["--nodes", "2"]);
    assert_eq!(again.code, 3, "{}", again.stderr);
    assert!(again.stderr.contains(&format!("portolan lab down --name {}", lab.name)), "{}", again.stderr);

    assert_eq!(lab.run("down", &[]).code, 0);
    lab.assert_gone();
    assert_answers(&neighbour);
    lab.up(CART, &["--nodes", "2"]);
    assert_answers(&lab);
    assert_answers(&neighbour);
    assert_eq!(neighbour.run("down", &[]).code, 0);
    neighbour.assert_gone();
    assert_answers(&lab);
}

#[test]
fn a_lab_that_is_killed_while_it_comes_up_is_removed_by_down() {
    let Some(lab) = TestLab::new() else { return };
    // Each round is cut off at another moment.
    for moment in ["lab.json", "supervisor.pid", "supervisor.sock", "api.sock", "nodes/node-1/agent.pid", "pods"] {
        let file = lab.manifest(CART);
        let mut up = lab.command();
        up.args(["lab", "up", "--name", &lab.name, "-f", &file, "--nodes", "2", "--wait"]);
        let mut up = up.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starting");
        until(moment, || lab.directory().join(moment).exists());
        // Both at once, as when the machine is switched off: neither may clean up.
        up.kill().expect("killing");
        // A supervisor that finds its parent gone removes the lab, and the file with it.
        if let Ok(number) = std::fs::read_to_string(lab.directory().join("supervisor.pid")) {
            let supervisor = Pid::from_raw(number.parse().expect("a number"));
            let _ = kill(supervisor, Signal::SIGKILL);
        }
        up.wait().expect("waiting");
        // A supervisor that had just begun finds its parent gone, and removes the lab itself.
        let down = lab.run("down", &[]);
        assert!([0, 1].contains(&down.code), "{moment}: {}", down.stderr);
        until("the lab is gone", || !lab.directory().exists());
        lab.assert_gone();
    }
}

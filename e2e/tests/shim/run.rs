//! One process in one sandbox: its output, its end, its arguments and surroundings (A3, A7).

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bailey_e2e::images::busybox;
use bailey_e2e::machine::test_with;
use bailey_e2e::settings::{is_ours, only_ours};
use bailey_e2e::wait;

const SOON: Duration = Duration::from_secs(60);

#[test]
fn output_goes_to_its_own_stream() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let output = machine.run(image).sh("echo out; echo err >&2").output()?.success()?;
        assert_eq!((output.text().as_str(), output.errors().as_str()), ("out\n", "err\n"));
        Ok(())
    })
}

#[test]
fn exit_codes_arrive() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        for code in [0, 1, 3, 255] {
            machine.run(image).sh(&format!("exit {code}")).output()?.expect(code)?;
        }
        // A process that a signal ended, as a shell reports it, and as containerd does.
        machine.run(image).sh("sleep 100 & kill -TERM $!; wait $!").output()?.expect(143)?;
        Ok(())
    })
}

#[test]
fn unknown_command_is_named() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let output = machine.run(image).args(&["no-such-command"]).output()?;
        assert_ne!(output.code, 0);
        let said = output.errors();
        assert!(said.contains("no-such-command"), "{said}");
        assert!(said.contains("not found") || said.contains("no such file"), "{said}");
        Ok(())
    })
}

#[test]
fn environment_is_the_images_and_the_users() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let run = machine.run(image).env("COLOUR=green").env("EMPTY=").args(&["env"]);
        let mut lines: Vec<String> = run.output()?.success()?.text().lines().map(str::to_owned).collect();
        lines.sort();
        // runc itself adds this one.
        lines.retain(|line| is_ours() || !line.starts_with("HOME="));
        let expected =
            ["COLOUR=green", "EMPTY=", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];
        assert_eq!(lines, expected);
        Ok(())
    })
}

#[test]
fn arguments_and_folder() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let odd = ["", "a b", "\"'$(x)\\", "ü€"];
        let mut args = vec!["sh", "-c", "pwd; for a; do printf '<%s>' \"$a\"; done", "sh"];
        args.extend(odd);
        let text = machine.run(image).cwd("/var/tmp").args(&args).output()?.success()?.text();
        assert_eq!(text, "/var/tmp\n<><a b><\"'$(x)\\><ü€>");
        Ok(())
    })
}

#[test]
fn input_reaches_the_process_and_ends() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let output = machine.run(image).args(&["cat"]).input("one\ntwo\n").output()?.success()?;
        assert_eq!(output.text(), "one\ntwo\n");
        Ok(())
    })
}

#[test]
fn input_is_interactive() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let mut task = machine.run(image).sh("while read l; do echo \"got $l\"; done; echo end").start()?;
        for word in ["one", "two"] {
            task.streams()?.say(&format!("{word}\n"))?;
            task.wait_for(&format!("got {word}\n"))?;
        }
        task.streams()?.close_input();
        assert_eq!(task.wait()?.success()?.text(), "got one\ngot two\nend\n");
        Ok(())
    })
}

#[test]
fn ten_megabytes_both_ways() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        // Not periodic in any power of two, so that a block lost or doubled shows.
        let input: Vec<u8> =
            (0_u32..10 << 20).map(|at| u8::try_from((at % 251) ^ (at / 65_521 % 5)).unwrap_or(0)).collect();
        let output = machine.run(image).args(&["cat"]).input(input.clone()).output()?.success()?;
        assert_eq!(output.stdout.len(), input.len());
        assert!(output.stdout == input, "the same length, but other bytes");
        Ok(())
    })
}

#[test]
fn output_larger_than_any_buffer_is_complete_at_exit() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let script = "dd if=/dev/zero bs=65536 count=160 2>/dev/null; printf last; printf end >&2";
        let output = machine.run(image).sh(script).output()?.success()?;
        assert_eq!((output.stdout.len(), output.errors().as_str()), ((160 << 16) + 4, "end"));
        assert!(output.stdout.ends_with(b"\0last"));
        Ok(())
    })
}

#[test]
fn terminal() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        // The size comes right after the start, as it does whenever a terminal's size changes.
        let script = "test -t 0 && test -t 1 && test -t 2 || exit 1; tty; \
            for i in $(seq 400); do [ \"$(stty size 2>/dev/null)\" = '31 97' ] && exit 0; usleep 50000; done; exit 2";
        let text = machine.run(image).terminal(31, 97).sh(script).output()?.success()?.text();
        assert!(text.contains("/dev/"), "{text:?}");
        let without = machine.run(image).sh("test -t 1").output()?;
        assert_eq!(without.code, 1);
        Ok(())
    })
}

#[test]
fn a_small_init_reaps_and_passes_signals_on() -> Result<()> {
    if !only_ours("the annotation is ours") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let output =
            machine.run(image).annotation("dev.bailey.init", "true").sh("echo $$").output()?.success()?;
        assert_eq!(output.text(), "2\n", "the workload is not the first process");
        let output = machine.run(image).annotation("dev.bailey.init", "true").sh("exit 7").output()?;
        assert_eq!(output.code, 7);
        // Orphans come to the init, and leave no zombies.
        let script = "(sleep 0.1 &) ; sleep 0.5; ps -o stat | grep -c Z";
        let output = machine.run(image).annotation("dev.bailey.init", "true").sh(script).output()?;
        assert_eq!(output.text(), "0\n");
        Ok(())
    })
}

/// A program for containerd's logging: says in a folder what it got.
const LOGGER: &str = "#!/bin/sh\n\
    echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\" >\"$2/called\"; exec 5>&-\n\
    cat <&3 >\"$2/out\" & cat <&4 >\"$2/err\" & exec 3<&- 4<&-; wait; echo ended >\"$2/ended\"\n";

#[test]
fn output_goes_to_a_program() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let folder = machine.containerd.folder().join("logs");
        fs::create_dir(&folder)?;
        let program = folder.join("a logger");
        fs::write(&program, LOGGER)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let uri = |program: &Path| {
            format!("binary://{}?dir={}", program.display(), folder.display()).replace(' ', "%20")
        };
        let script = "echo to out; echo to err >&2; seq 20000; exit 4";
        let mut task = machine.run(image).option("--log-uri", &uri(&program)).sh(script).detach()?;
        wait::until_true("its end", SOON, || Ok(task.state()?.as_deref() == Some("STOPPED")))?;
        task.remove()?;
        let said = |name: &str| fs::read_to_string(folder.join(name)).with_context(|| name.to_owned());
        let out = said("out")?;
        assert!(out.starts_with("to out\n1\n2\n") && out.ends_with("\n20000\n"), "{} bytes", out.len());
        assert_eq!(said("err")?, "to err\n");
        if only_ours("runc's shim ends the program by a signal, ours lets it end by itself") {
            assert_eq!(said("ended")?, "ended\n");
        }
        let called = format!("{} {} dir {}\n", machine.containerd.namespace(), task.id, folder.display());
        assert_eq!(said("called")?, called);
        Ok(())
    })
}

#[test]
fn a_program_that_takes_no_output_is_named() -> Result<()> {
    if !only_ours("its errors") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let broken = machine.containerd.folder().join("broken");
        fs::write(&broken, "#!/bin/sh\nexit 3\n")?;
        fs::set_permissions(&broken, fs::Permissions::from_mode(0o755))?;
        let broken = broken.to_string_lossy();
        for (uri, words) in [
            ("binary:///no/such/logger".to_owned(), ["/no/such/logger", "there is no program"]),
            (format!("binary://{broken}"), [&*broken, "exit status: 3"]),
            ("tcp://127.0.0.1:514".to_owned(), ["tcp://", "not supported"]),
        ] {
            let run = machine.run(image).option("--log-uri", &uri).args(&["true"]);
            let output = run.output()?;
            for word in words {
                ensure!(
                    output.code != 0 && output.errors().contains(word),
                    "{uri}: no {word:?} in {output:?}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn output_goes_to_a_file() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let file = machine.containerd.folder().join("logs/deep/file");
        let uri = format!("file://{}", file.display());
        let mut task = machine.run(image).option("--log-uri", &uri).sh("echo out; echo err >&2").detach()?;
        wait::until_true("its end", SOON, || Ok(task.state()?.as_deref() == Some("STOPPED")))?;
        task.remove()?;
        let said = fs::read_to_string(&file).with_context(|| uri)?;
        let mut lines: Vec<&str> = said.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["err", "out"]);
        Ok(())
    })
}

//! One process in one sandbox: its output, its end, its arguments and surroundings (A3, A7).

use anyhow::Result;
use bailey_e2e::images::busybox;
use bailey_e2e::machine::test_with;
use bailey_e2e::settings::is_ours;

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

//! Real programs from Debian: an interpreter, a web server, a store, a database (A1, A4).

use std::time::Duration;

use anyhow::{Result, bail};
use bailey_e2e::ctr::Task;
use bailey_e2e::images::{base, nginx, postgresql, redis};
use bailey_e2e::machine::test_with;
use bailey_e2e::process::Output;
use bailey_e2e::wait;

const SOON: Duration = Duration::from_secs(90);

#[test]
fn bash() -> Result<()> {
    test_with(&base(), |machine, image| {
        let script = "set -o pipefail; a=(1 2 3); echo $(( a[0] + a[1] + a[2] )) <(true) | tr -d ' '; \
            seq 1000 | sort -rn | head -n 1; [[ abc =~ ^a(.)c$ ]] && echo ${BASH_REMATCH[1]}";
        let output = machine.run(image).args(&["bash", "-c", script]).output()?;
        let text = output.text();
        assert!(text.starts_with("6/dev/fd/"), "{output:?}");
        assert!(text.ends_with("1000\nb\n"), "{output:?}");
        Ok(())
    })
}

#[test]
fn python_with_processes_threads_and_sockets() -> Result<()> {
    const PROGRAM: &str = r#"
import socket, subprocess, threading
print(sum(n * n for n in range(1000)))
print(subprocess.run(["sh", "-c", "read x; echo $x; exit 4"], input=b"hello\n", capture_output=True))
server = socket.create_server(("127.0.0.1", 0))
def serve():
    connection, _ = server.accept()
    connection.sendall(connection.recv(100).upper())
    connection.close()
thread = threading.Thread(target=serve)
thread.start()
client = socket.create_connection(server.getsockname())
client.sendall(b"over loopback")
print(client.recv(100))
thread.join()
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("127.0.0.1", 0))
datagrams.sendto(b"datagram", datagrams.getsockname())
print(datagrams.recv(100))
"#;
    test_with(&base(), |machine, image| {
        let text = machine.run(image).args(&["python3", "-c", PROGRAM]).output()?.success()?.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "332833500");
        assert!(lines[1].contains("returncode=4, stdout=b'hello\\n'"), "{text}");
        assert_eq!(&lines[2..], ["b'OVER LOOPBACK'", "b'datagram'"]);
        Ok(())
    })
}

#[test]
fn nginx_serves() -> Result<()> {
    test_with(&nginx(), |machine, image| {
        let mut task = machine.run(image).start()?;
        let page = until_success(&mut task, "busybox wget -q -O - http://127.0.0.1/")?;
        assert!(page.contains("Welcome to nginx!"), "{page}");
        let workers = task.sh("cat /proc/[0-9]*/comm | grep -c nginx")?.success()?.text();
        assert!(workers.trim().parse::<u32>()? >= 2, "a master and workers: {workers}");
        task.kill("SIGQUIT")?;
        task.wait()?.success().map(drop)
    })
}

#[test]
fn redis_stores() -> Result<()> {
    test_with(&redis(), |machine, image| {
        let mut task = machine.run(image).start()?;
        assert_eq!(until_success(&mut task, "redis-cli ping | grep PONG")?, "PONG\n");
        assert_eq!(task.sh("redis-cli set key 'a value'")?.success()?.text(), "OK\n");
        assert_eq!(task.sh("redis-cli get key")?.success()?.text(), "a value\n");
        assert_eq!(
            task.sh("for i in $(seq 200); do echo incr n; done | redis-cli | tail -n 1")?.text(),
            "200\n"
        );
        task.sh("redis-cli shutdown nosave")?;
        task.wait()?.success().map(drop)
    })
}

#[test]
fn postgresql_stores_and_recovers_from_a_crash() -> Result<()> {
    test_with(&postgresql(), |machine, image| {
        let mut task = machine.run(image).start()?;
        until_success(&mut task, "psql -Atc 'select 1' postgres")?;
        sql(&task, "create table t (n int primary key, text text)")?.success()?;
        sql(&task, "insert into t select n, 'row ' || n from generate_series(1, 5000) n")?.success()?;
        assert_eq!(sql(&task, "select count(*), max(text) from t")?.success()?.text(), "5000|row 999\n");
        assert_ne!(sql(&task, "insert into t values (1, 'again')")?.code, 0, "a duplicate key");
        // A crash of one server process makes the others recover from the log.
        task.exec(&["pkill", "-KILL", "-f", "wal[w]riter"]).output()?.success()?;
        until_success(&mut task, "psql -Atc 'select count(*) from t' postgres | grep 5000")?;
        task.kill("SIGINT")?;
        task.wait()?.success().map(drop)
    })
}

#[test]
fn postgresql_stops_at_once_when_told() -> Result<()> {
    test_with(&postgresql(), |machine, image| {
        let mut task = machine.run(image).start()?;
        until_success(&mut task, "psql -Atc 'select 1' postgres")?;
        task.kill("SIGQUIT")?;
        // An immediate shutdown is an abnormal end for PostgreSQL itself, too; it exits all the same.
        let output = task.wait()?;
        assert!(output.errors().contains("immediate shutdown"), "{output:?}");
        Ok(())
    })
}

fn sql(task: &Task<'_>, query: &str) -> Result<Output> {
    task.exec(&["psql", "-AtXv", "ON_ERROR_STOP=1", "-c", query, "postgres"]).output()
}

/// Runs a script in a container until it succeeds, and returns what it wrote.
fn until_success(task: &mut Task<'_>, script: &str) -> Result<String> {
    let mut last = String::new();
    let done = wait::until(script, SOON, || {
        let streams = task.streams()?;
        if streams.has_ended() {
            bail!("it ended: {}", streams.all_heard());
        }
        let output = task.sh(script)?;
        let text = (output.code == 0).then(|| output.text());
        last = output.errors();
        Ok(text)
    });
    done.map_err(|error| error.context(format!("the last time: {last}")))
}

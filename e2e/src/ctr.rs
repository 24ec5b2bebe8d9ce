//! containerd's own command line, `ctr`, as tests use it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use crate::images::Image;
use crate::machine::Machine;
use crate::process::{self, Output, Running};
use crate::{settings, wait};

/// For every call that says nothing else: a microVM boots in seconds even on a machine that is busy.
pub const LIMIT: Duration = Duration::from_secs(120);

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Machine {
    /// `ctr` with some words after it.
    pub fn ctr(&self, words: &[&str]) -> Result<Output> {
        process::run(self.ctr_command().args(words), LIMIT)
    }

    /// `ctr` with some words after it, in another of containerd's namespaces. Its name should hold the machine's own, so
    /// that what is left of it is found.
    pub fn ctr_in(&self, namespace: &str, words: &[&str]) -> Result<Output> {
        let mut command = self.containerd.command("ctr");
        command.arg("--address").arg(self.containerd.socket()).args(["--namespace", namespace]);
        process::run(command.args(words), LIMIT)
    }

    /// Starts `ctr` and leaves it running.
    pub fn start_ctr(&self, words: &[&str]) -> Result<Running> {
        Running::start(self.ctr_command().args(words))
    }

    /// Brings an image into containerd.
    pub fn import(&self, image: &Image) -> Result<()> {
        let mut ctr = self.ctr_command();
        ctr.args(["images", "import", "--snapshotter", &settings::snapshotter()]).arg(&image.archive);
        let done = process::run(&mut ctr, LIMIT).and_then(Output::success);
        done.with_context(|| format!("importing {}", image.reference)).map(drop)
    }

    /// A task that was started before, perhaps by an earlier containerd.
    pub fn found(&self, id: &str) -> Task<'_> {
        Task { machine: self, id: id.to_owned(), ctr: None }
    }

    fn ctr_command(&self) -> Command {
        let mut command = self.containerd.command("ctr");
        command.arg("--address").arg(self.containerd.socket());
        command.args(["--namespace", self.containerd.namespace()]);
        command
    }
}

/// A container to be run.
#[derive(Clone)]
pub struct Run<'m> {
    machine: &'m Machine,
    image: String,
    id: String,
    flags: Vec<String>,
    args: Vec<String>,
    input: Option<Vec<u8>>,
    terminal: Option<(u16, u16)>,
    spec: Option<PathBuf>,
    limit: Duration,
}

impl<'m> Run<'m> {
    pub(crate) fn new(machine: &'m Machine, image: &str) -> Self {
        Self {
            machine,
            image: image.to_owned(),
            id: format!("c{}", COUNT.fetch_add(1, Ordering::Relaxed)),
            flags: Vec::new(),
            args: Vec::new(),
            input: None,
            terminal: None,
            spec: None,
            limit: LIMIT,
        }
    }

    /// The program and its arguments, instead of the image's.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// A script for the image's shell.
    pub fn sh(self, script: &str) -> Self {
        self.args(&["/bin/sh", "-c", script])
    }

    /// Any flag of `ctr run`.
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// Any flag of `ctr run` that has a value.
    pub fn option(self, name: &str, value: &str) -> Self {
        self.flag(name).flag(value)
    }

    /// An environment variable: `NAME=value`.
    pub fn env(self, pair: &str) -> Self {
        self.option("--env", pair)
    }

    /// The working folder.
    pub fn cwd(self, cwd: &str) -> Self {
        self.option("--cwd", cwd)
    }

    /// An OCI annotation.
    pub fn annotation(self, name: &str, value: &str) -> Self {
        self.option("--annotation", &format!("{name}={value}"))
    }

    /// The most memory, in MiB.
    pub fn memory_mib(self, mib: u64) -> Self {
        self.option("--memory-limit", &(mib << 20).to_string())
    }

    /// What it reads.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// Gives it a terminal of that many rows and columns.
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.terminal = Some((rows, columns));
        self.flag("--tty")
    }

    /// How long all of it may take.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// A container from a whole OCI runtime specification, for what `ctr run` has no flag for. `change` gets what
    /// containerd would make of no flags at all, with this run's arguments and with `root` as root folder.
    pub fn with_spec(
        mut self,
        root: &Path,
        change: impl FnOnce(&mut serde_json::Value) -> Result<()>,
    ) -> Result<Self> {
        let text = self.machine.ctr(&["oci", "spec"])?.success()?.text();
        let mut spec: serde_json::Value = serde_json::from_str(&text).context("reading the specification")?;
        spec["root"]["path"] = root.to_str().ok_or_else(|| anyhow!("{} is no text", root.display()))?.into();
        spec["process"]["args"] = self.args.clone().into();
        spec["process"]["cwd"] = "/".into();
        spec["linux"]["cgroupsPath"] = format!("/{}/{}", self.machine.containerd.namespace(), self.id).into();
        change(&mut spec)?;
        let path = self.machine.containerd.folder().join(format!("{}.json", self.id));
        std::fs::write(&path, spec.to_string()).context("writing the specification")?;
        self.spec = Some(path);
        Ok(self)
    }

    /// Runs it to its end, and removes it.
    pub fn output(self) -> Result<Output> {
        let what = format!("running {:?}", self.args);
        self.run_to_end().context(what)
    }

    fn run_to_end(mut self) -> Result<Output> {
        let limit = self.limit;
        let Some(input) = self.input.take() else {
            return Running::start(&mut self.command(&["--rm"]))?.wait(limit);
        };
        // ctr does not pass on an end of input that it sees before the task exists.
        let mut task = self.start()?;
        task.streams()?.feed(input)?;
        task.streams()?.wait_open(limit)
    }

    /// Starts it with its streams connected, and waits until it runs.
    pub fn start(self) -> Result<Task<'m>> {
        let ctr = Running::start(&mut self.command(&["--rm"]))?;
        let task = Task { machine: self.machine, id: self.id.clone(), ctr: Some(ctr) };
        let what = format!("a running {:?}", self.args);
        wait::until_true(&what, self.limit, || task.has_started())?;
        Ok(task)
    }

    /// Starts it without anybody at its streams; they can be attached to later.
    pub fn detach(self) -> Result<Task<'m>> {
        let done = process::run(&mut self.command(&["--detach"]), self.limit).and_then(Output::success);
        done.with_context(|| format!("starting {:?}", self.args))?;
        Ok(Task { machine: self.machine, id: self.id, ctr: None })
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut ctr = self.machine.ctr_command();
        ctr.args(["run", "--runtime", &settings::runtime(), "--snapshotter", &settings::snapshotter()]);
        ctr.args(flags).args(&self.flags);
        match &self.spec {
            Some(spec) => ctr.arg("--config").arg(spec).arg(&self.id),
            None => ctr.args([&self.image, &self.id]).args(&self.args),
        };
        match self.terminal {
            Some(size) => in_terminal(&ctr, size),
            None => ctr,
        }
    }
}

/// The same command with a terminal of that many rows and columns around it.
fn in_terminal(command: &Command, (rows, columns): (u16, u16)) -> Command {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''")));
    let line = format!("stty rows {rows} cols {columns} && exec {}", quoted.collect::<Vec<_>>().join(" "));
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    script.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("SHELL", "/bin/sh");
    script
}

/// A container that runs. Dropping it kills it.
pub struct Task<'m> {
    machine: &'m Machine,
    /// Its name.
    pub id: String,
    /// The `ctr run` that its streams are connected to.
    ctr: Option<Running>,
}

impl Task<'_> {
    /// `ctr task <verb> … <id>`.
    pub fn task(&self, verb: &str, flags: &[&str]) -> Result<Output> {
        let mut words = vec!["task", verb];
        words.extend(flags);
        words.push(&self.id);
        self.machine.ctr(&words)
    }

    /// Its state, as `ctr task ls` tells it: RUNNING, PAUSED, STOPPED, CREATED or nothing.
    pub fn state(&self) -> Result<Option<String>> {
        Ok(self.row()?.and_then(|row| row.get(2).cloned()))
    }

    /// The process id that containerd knows for it.
    pub fn pid(&self) -> Result<Option<String>> {
        Ok(self.row()?.and_then(|row| row.get(1).cloned()))
    }

    fn row(&self) -> Result<Option<Vec<String>>> {
        let list = self.machine.ctr(&["task", "ls"])?.success()?.text();
        let mut rows =
            list.lines().map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        Ok(rows.find(|row| row.first() == Some(&self.id)))
    }

    /// Whether it runs or has run; an error if `ctr run` gave up.
    fn has_started(&self) -> Result<bool> {
        // containerd says UNKNOWN of a shim that does not answer in time.
        if self.state()?.is_some_and(|state| ["RUNNING", "STOPPED"].contains(&state.as_str())) {
            return Ok(true);
        }
        if let Some(ctr) = self.ctr.as_ref().filter(|ctr| ctr.has_ended()) {
            anyhow::bail!("ctr run ended: {}", ctr.all_heard());
        }
        Ok(false)
    }

    /// Describes a process to be run in it.
    pub fn exec(&self, args: &[&str]) -> Exec<'_> {
        Exec {
            task: self,
            id: format!("x{}", COUNT.fetch_add(1, Ordering::Relaxed)),
            flags: Vec::new(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            input: None,
            terminal: None,
            limit: LIMIT,
        }
    }

    /// Runs a script of the image's shell in it.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.exec(&["/bin/sh", "-c", script]).output()
    }

    /// Sends a signal, by its name.
    pub fn kill(&self, signal: &str) -> Result<()> {
        self.task("kill", &["--signal", signal])?.success().map(drop)
    }

    /// The connection to its streams.
    pub fn streams(&mut self) -> Result<&mut Running> {
        self.ctr.as_mut().ok_or_else(|| anyhow!("{} was started detached", self.id))
    }

    /// Waits until it has written something.
    pub fn wait_for(&self, text: &str) -> Result<String> {
        let ctr = self.ctr.as_ref().ok_or_else(|| anyhow!("{} was started detached", self.id))?;
        ctr.wait_for(text, LIMIT)
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<Output> {
        self.streams()?.wait_open(LIMIT)
    }

    /// Connects to the streams of a task that was started detached.
    pub fn attach(&mut self) -> Result<()> {
        self.ctr = Some(self.machine.start_ctr(&["task", "attach", &self.id])?);
        Ok(())
    }

    /// Kills it and waits for its end, which removes it, too.
    pub fn end(&mut self) -> Result<Output> {
        self.kill("SIGKILL")?;
        self.wait()
    }

    /// Kills what was started detached if it still runs, and removes the task and the container.
    pub fn remove(&mut self) -> Result<()> {
        self.task("delete", &["--force"])?.success()?;
        self.machine.ctr(&["container", "rm", &self.id])?.success().map(drop)
    }
}

/// A process to be run in a running container.
pub struct Exec<'t> {
    task: &'t Task<'t>,
    id: String,
    flags: Vec<String>,
    args: Vec<String>,
    input: Option<Vec<u8>>,
    terminal: Option<(u16, u16)>,
    limit: Duration,
}

impl Exec<'_> {
    /// Any flag of `ctr task exec` that has a value.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.flags.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// What it reads.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// Gives it a terminal of that many rows and columns.
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.terminal = Some((rows, columns));
        self
    }

    /// Its name, for `ctr task kill --exec-id`.
    pub fn id(&self) -> String {
        self.id.clone()
    }

    /// How long all of it may take.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end.
    pub fn output(mut self) -> Result<Output> {
        let (limit, input) = (self.limit, self.input.take());
        let what = format!("running {:?} in {}", self.args, self.task.id);
        let mut ctr = self.start()?;
        if let Some(input) = input {
            ctr.feed(input)?;
        }
        ctr.wait(limit).context(what)
    }

    /// Starts it and leaves it running.
    pub fn start(self) -> Result<Running> {
        let mut ctr = self.task.machine.ctr_command();
        ctr.args(["task", "exec", "--exec-id", &self.id]).args(&self.flags);
        if self.terminal.is_some() {
            ctr.arg("--tty");
        }
        ctr.arg(&self.task.id).args(&self.args);
        match self.terminal {
            Some(size) => Running::start(&mut in_terminal(&ctr, size)),
            None => Running::start(&mut ctr),
        }
    }
}

//! The task service: requests of containerd, one sandbox.
//!
//! A task is created (its VM runs, its first process waits), running, paused, or stopped (its first process has
//! ended). One lock guards it; only waiting for an end is done without.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bailey_types::guest::ProcessId;
use bailey_types::guest::message::{Request, Response};
use containerd_shim_protos::api;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use tokio::sync::{Mutex, Notify};

use super::io::{Outputs, Owner};
use super::process::{Exit, Process, StdioNames};
use super::{Publisher, exits, stats};
use crate::bundle::{self, Plan};
use crate::clock;
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};
use crate::image::{self, Layers, RootfsMount};
use crate::sandbox::Sandbox;
use crate::template::Spare;

pub(crate) struct Service {
    pub(super) namespace: String,
    pub(super) id: String,
    pub(super) publisher: Publisher,
    pub(super) task: Mutex<Option<Task>>,
    /// Held while a task is made; and the VM that is ready for it, if one is.
    creating: Mutex<Option<Spare>>,
    /// Told when the shim is to end.
    pub(crate) shutdown: Notify,
}

pub(super) struct Task {
    pub(super) sandbox: Sandbox,
    pub(super) processes: BTreeMap<String, Process>,
    pub(super) bundle: PathBuf,
    pub(super) paused: bool,
    next: u32,
    /// What outputs are carried with; none once the first process has ended, when no more can be.
    pub(super) outputs: Option<Outputs>,
}

impl Task {
    pub(super) fn init(&self) -> Option<&Process> {
        self.processes.get("")
    }

    fn process(&mut self, exec_id: &str) -> Result<&mut Process> {
        self.processes.get_mut(exec_id).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no process {exec_id} in the container"))
        })
    }
}

impl Service {
    pub(crate) fn new(namespace: &str, id: &str, publisher: Publisher, spare: Option<Spare>) -> Arc<Service> {
        Arc::new(Service {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            publisher,
            task: Mutex::new(None),
            creating: Mutex::new(spare),
            shutdown: Notify::new(),
        })
    }

    /// Whether there is no task, so that the shim may end.
    pub(crate) async fn is_over(&self) -> bool {
        self.task.lock().await.is_none()
    }

    pub(super) async fn create_task(self: &Arc<Service>, request: api::CreateTaskRequest) -> Result<u32> {
        // Making a sandbox takes its time: whoever asks meanwhile is told that there is none yet.
        let mut creating = self.creating.try_lock().map_err(|_| self.exists())?;
        if self.task.lock().await.is_some() {
            return Err(self.exists());
        }
        if !request.checkpoint.is_empty() {
            return Err(Error::invalid("a sandbox cannot be restored from a checkpoint"));
        }
        let bundle = PathBuf::from(&request.bundle);
        let config = Config::load(options_path(&request).as_deref())?;
        for folder in [&config.state_dir, &config.cache_dir] {
            std::fs::create_dir_all(folder).context(|| format!("making {}", folder.display()))?;
        }
        let mut plan =
            bundle::plan(&bundle::load_spec(&bundle)?, &self.namespace, &self.id, request.terminal)?;
        let mut init = Process::new(
            ProcessId::INIT,
            "",
            StdioNames {
                input: request.stdin.clone(),
                output: request.stdout.clone(),
                error: request.stderr.clone(),
                terminal: request.terminal,
            },
            plan.container.process.clone(),
        );
        if let Some(spec) = init.spec.take() {
            plan.container.process = *spec;
        }
        let image = self.image(&config, &bundle, &plan, &request).await?;
        let (sandbox, events) =
            Sandbox::launch(&config, &self.namespace, &self.id, &plan, image, creating.take()).await?;
        let owner = Owner { namespace: self.namespace.clone(), id: self.id.clone() };
        let (outputs, all_carried) = Outputs::new(owner, plan.annotations.log_bytes_per_second);
        init.attach(&sandbox.guest, &outputs).await?;
        sandbox.request(Request::Create(Box::new(fit(&plan, &sandbox)))).await?;
        init.pid = sandbox.machine.pid();
        let pid = init.pid;
        let processes = BTreeMap::from([(String::new(), init)]);
        *self.task.lock().await = Some(Task {
            sandbox,
            processes,
            bundle,
            paused: false,
            next: ProcessId::INIT.0 + 1,
            outputs: Some(outputs),
        });
        tokio::spawn(exits::follow(Arc::clone(self), events, all_carried));
        self.publisher.publish(&created(&self.id, pid, request));
        Ok(pid)
    }

    fn exists(&self) -> Error {
        Error::new(Kind::AlreadyExists, format!("the task {} is there already", self.id))
    }

    async fn image(
        &self,
        config: &Config,
        bundle: &Path,
        plan: &Plan,
        request: &api::CreateTaskRequest,
    ) -> Result<image::Image> {
        let mounts: Vec<RootfsMount> = request
            .rootfs
            .iter()
            .map(|mount| RootfsMount {
                kind: mount.type_.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
            })
            .collect();
        let layers = Layers::from_mounts(&mounts, &bundle.join(&plan.root))?;
        let maker = image::Maker {
            config: config.clone(),
            namespace: self.namespace.clone(),
            cgroup: plan.cgroup.clone(),
            bundle: bundle.to_owned(),
        };
        let prepared = tokio::task::spawn_blocking(move || image::prepare(&maker, &layers)).await;
        prepared.context(|| "preparing the image".into())?
    }

    pub(super) async fn start_process(&self, exec_id: &str) -> Result<u32> {
        // Held until the start is told: no end of this process can be told before.
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        let process = task.processes.get_mut(exec_id).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no process {exec_id} in the container"))
        })?;
        if process.started {
            return Err(Error::new(Kind::State, "the process was started already"));
        }
        if exec_id.is_empty() {
            task.sandbox.request(Request::Start).await?;
        } else {
            let spec =
                process.spec.clone().ok_or_else(|| Error::internal("the process has nothing to run"))?;
            let outputs =
                task.outputs.as_ref().ok_or_else(|| Error::new(Kind::State, "the container has ended"))?;
            process.attach(&task.sandbox.guest, outputs).await?;
            match task.sandbox.request(Request::Exec { id: process.id, process: spec }).await {
                Ok(Response::Started { pid }) => process.pid = pid,
                Ok(_) => return Err(Error::internal("the guest answered something else")),
                Err(error) => {
                    // The caller waits for the end of its streams before it goes on.
                    process.detach();
                    task.sandbox.guest.forget(process.id);
                    return Err(error);
                }
            }
        }
        process.started = true;
        let (container_id, pid) = (self.id.clone(), process.pid);
        if exec_id.is_empty() {
            self.publisher.publish(&TaskStart { container_id, pid, ..TaskStart::default() });
        } else {
            let exec_id = exec_id.to_owned();
            self.publisher.publish(&TaskExecStarted {
                container_id,
                exec_id,
                pid,
                ..TaskExecStarted::default()
            });
        }
        Ok(pid)
    }

    pub(super) async fn add_exec(&self, request: api::ExecProcessRequest) -> Result<()> {
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        if task.processes.contains_key(&request.exec_id) {
            let text = format!("the process {} is there already", request.exec_id);
            return Err(Error::new(Kind::AlreadyExists, text));
        }
        let spec: oci_spec::runtime::Process = serde_json::from_slice(&request.spec.value)
            .context_as(Kind::Invalid, || "reading the process's specification".into())?;
        let spec = bundle::convert_process(&spec, request.terminal)?;
        let id = ProcessId(task.next);
        task.next += 1;
        let names = StdioNames {
            input: request.stdin,
            output: request.stdout,
            error: request.stderr,
            terminal: request.terminal,
        };
        task.processes.insert(request.exec_id.clone(), Process::new(id, &request.exec_id, names, spec));
        self.publisher.publish(&TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        });
        Ok(())
    }

    pub(super) async fn delete_process(&self, exec_id: &str) -> Result<(u32, Exit)> {
        let (mut process, exit) = self.take_ended(exec_id).await?;
        // Without the lock: who does not take its output keeps nobody else waiting.
        process.drain().await;
        let mut state = self.task.lock().await;
        if let Some(task) = state.as_ref() {
            task.sandbox.guest.forget(process.id);
        }
        if exec_id.is_empty() {
            // Dropping the task ends the VMM and gives back all that it had.
            *state = None;
            self.publisher.publish(&TaskDelete {
                container_id: self.id.clone(),
                pid: process.pid,
                exit_status: exit.status,
                exited_at: MessageField::some(clock::timestamp(exit.at)),
                ..TaskDelete::default()
            });
        }
        Ok((process.pid, exit))
    }

    /// Takes a process out of the task, if it does not run.
    async fn take_ended(&self, exec_id: &str) -> Result<(Process, Exit)> {
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        let process = task.process(exec_id)?;
        let exit = match process.exited() {
            Some(exit) => exit,
            None if process.started => {
                return Err(Error::new(Kind::State, "the process runs: stop it before deleting it"));
            }
            None => {
                // It has never run, and its streams have nothing to bring.
                process.detach();
                Exit { status: 0, at: clock::since_epoch() }
            }
        };
        let process = task.processes.remove(exec_id);
        process.map(|process| (process, exit)).ok_or_else(|| Error::internal("the process is gone"))
    }

    pub(super) async fn kill(&self, request: api::KillRequest) -> Result<()> {
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        let process = task.process(&request.exec_id)?;
        if process.exited().is_some() {
            return Err(Error::new(Kind::NotFound, "the process has ended already"));
        }
        let (id, created) = (process.id, !process.started);
        let signal = i32::try_from(request.signal).map_err(|_| Error::invalid("there is no such signal"))?;
        if !created && task.paused && signal == libc::SIGKILL {
            // It could not die while its processors stand still.
            task.sandbox.machine.resume().await?;
            task.paused = false;
        }
        if created && !request.exec_id.is_empty() {
            return Err(Error::new(Kind::NotFound, "the process does not run yet"));
        }
        task.sandbox.request(Request::Signal { id, signal, all: request.all }).await?;
        if created {
            // It never ran, so it never tells that it ended: its end counts from here.
            task.process("")?.started = true;
        }
        Ok(())
    }

    pub(super) async fn pause(&self, pause: bool) -> Result<()> {
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        if !task.init().is_some_and(|init| init.started && init.exited().is_none()) || task.paused == pause {
            let text =
                if pause { "only a running task can be paused" } else { "only a paused task can be resumed" };
            return Err(Error::new(Kind::State, text));
        }
        let container_id = self.id.clone();
        if pause {
            task.sandbox.machine.pause().await?;
            self.publisher.publish(&TaskPaused { container_id, ..TaskPaused::default() });
        } else {
            task.sandbox.machine.resume().await?;
            task.sandbox.request(Request::Clock { realtime_ns: clock::realtime_ns() }).await?;
            self.publisher.publish(&TaskResumed { container_id, ..TaskResumed::default() });
        }
        task.paused = pause;
        Ok(())
    }

    pub(super) async fn update(&self, request: api::UpdateTaskRequest) -> Result<()> {
        let resources: oci_spec::runtime::LinuxResources =
            serde_json::from_slice(&request.resources.value)
                .context_as(Kind::Invalid, || "reading the new resources".into())?;
        let limits = bundle::convert_limits(&resources)?;
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        let most = task.sandbox.memory_bytes;
        if let Some(bytes) = limits.memory_bytes.filter(|bytes| *bytes > most) {
            return Err(Error::invalid(format!(
                "{bytes} bytes of memory are more than the {most} that this sandbox was made for: start it anew"
            )));
        }
        task.sandbox.request(Request::Update(limits)).await?;
        let outside = bailey_host::cgroup::Limits {
            memory_bytes: None,
            pids: None,
            cpu_quota_us: limits.cpu_quota_us,
            cpu_period_us: limits.cpu_period_us,
            cpu_weight: limits.cpu_weight,
        };
        task.sandbox.cgroup.0.set(&outside).context(|| "changing the sandbox's limits".into())
    }

    pub(super) async fn pids(&self) -> Result<Vec<u32>> {
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        // A task that has ended and was not deleted has its first process, which nobody has asked for its end yet. With
        // none, a containerd that was restarted (1.7 and later) takes the shim for one without a task, and throws it
        // away with the end that it has to tell.
        if let Some(init) = task.init().filter(|init| init.exited().is_some()) {
            return Ok(vec![init.pid]);
        }
        match task.sandbox.request(Request::Pids).await? {
            Response::Pids(pids) => Ok(pids),
            _ => Err(Error::internal("the guest answered something else")),
        }
    }

    pub(super) async fn stats(&self) -> Result<api::StatsResponse> {
        let mut state = self.task.lock().await;
        match there(&mut state)?.sandbox.request(Request::Stats).await? {
            Response::Stats(stats) => Ok(api::StatsResponse {
                stats: MessageField::some(stats::pack(&stats)?),
                ..Default::default()
            }),
            _ => Err(Error::internal("the guest answered something else")),
        }
    }

    pub(super) async fn state(&self, exec_id: &str) -> Result<api::StateResponse> {
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        let (bundle, paused) = (task.bundle.display().to_string(), task.paused);
        let process = task.process(exec_id)?;
        let exit = process.exited();
        let status = match (exit, process.started) {
            (Some(_), _) => api::Status::STOPPED,
            (None, false) => api::Status::CREATED,
            (None, true) if paused => api::Status::PAUSED,
            (None, true) => api::Status::RUNNING,
        };
        let names = process.names.clone();
        Ok(api::StateResponse {
            id: self.id.clone(),
            bundle,
            pid: process.pid,
            status: status.into(),
            stdin: names.input,
            stdout: names.output,
            stderr: names.error,
            terminal: names.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| clock::timestamp(exit.at)).into(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        })
    }

    pub(super) async fn wait(&self, exec_id: &str) -> Result<Exit> {
        let mut exit = {
            let mut state = self.task.lock().await;
            there(&mut state)?.process(exec_id)?.exit.subscribe()
        };
        let ended = exit.wait_for(Option::is_some).await;
        let ended = ended.ok().and_then(|exit| *exit);
        ended.ok_or_else(|| Error::new(Kind::NotFound, "the process was deleted"))
    }

    pub(super) async fn resize(&self, request: api::ResizePtyRequest) -> Result<()> {
        let mut state = self.task.lock().await;
        let task = there(&mut state)?;
        let process = task.process(&request.exec_id)?;
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let (columns, rows) = (cells(request.width), cells(request.height));
        if let Some(spec) = process.spec.as_mut().filter(|_| !process.started) {
            spec.terminal = spec.terminal.map(|_| (columns, rows));
            if !request.exec_id.is_empty() {
                return Ok(());
            }
        }
        let id = process.id;
        task.sandbox.request(Request::Resize { id, columns, rows }).await.map(drop)
    }

    pub(super) async fn close_io(&self, request: &api::CloseIORequest) -> Result<()> {
        let mut state = self.task.lock().await;
        let process = there(&mut state)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(())
    }

    pub(super) async fn connect(&self) -> Result<api::ConnectResponse> {
        let mut state = self.task.lock().await;
        let task_pid = there(&mut state)?.init().map_or(0, |init| init.pid);
        let shim_pid = std::process::id();
        Ok(api::ConnectResponse {
            shim_pid,
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }
}

/// The container, with the memory that its sandbox has for it when it has no limit of its own.
fn fit(plan: &Plan, sandbox: &Sandbox) -> bailey_types::guest::spec::Container {
    let mut container = plan.container.clone();
    container.limits.memory_bytes.get_or_insert(sandbox.memory_bytes);
    container
}

fn there(state: &mut Option<Task>) -> Result<&mut Task> {
    state.as_mut().ok_or_else(|| Error::new(Kind::NotFound, "the task is not created, or deleted"))
}

/// The settings' file that the runtime's options name (containerd's `runtimeoptions.v1.Options`, field 2).
fn options_path(request: &api::CreateTaskRequest) -> Option<PathBuf> {
    use containerd_shim_protos::protobuf::CodedInputStream;
    let options = request.options.as_ref().filter(|options| options.type_url.contains("runtimeoptions"))?;
    let mut fields = CodedInputStream::from_bytes(&options.value);
    while let Ok(Some(tag)) = fields.read_raw_tag_or_eof() {
        let value = fields.read_string().ok()?;
        if tag == (2 << 3 | 2) {
            return Some(PathBuf::from(value)).filter(|path| !path.as_os_str().is_empty());
        }
    }
    None
}

fn created(id: &str, pid: u32, request: api::CreateTaskRequest) -> TaskCreate {
    let io = TaskIO {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        ..TaskIO::default()
    };
    TaskCreate {
        container_id: id.to_owned(),
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(io),
        pid,
        ..TaskCreate::default()
    }
}

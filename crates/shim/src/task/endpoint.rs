//! The task API as containerd calls it: requests in, answers or gRPC codes out.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Code};
use containerd_shim_protos::{api, shim_async};

use super::service::Service;
use crate::clock;
use crate::error::{Error, Kind};

/// An error as the task API has it.
fn status(error: Error) -> ttrpc::Error {
    let code = match error.kind() {
        Kind::Invalid => Code::INVALID_ARGUMENT,
        Kind::NotFound => Code::NOT_FOUND,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::State => Code::FAILED_PRECONDITION,
        Kind::Unavailable => Code::UNAVAILABLE,
        Kind::Internal => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.chain()))
}

/// The service as containerd calls it.
pub(crate) struct Endpoint(pub(crate) Arc<Service>);

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl shim_async::Task for Endpoint {
    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> Answer<api::StateResponse> {
        self.0.state(&request.exec_id).await.map_err(status)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Answer<api::CreateTaskResponse> {
        let pid = self.0.create_task(request).await.map_err(status)?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> Answer<api::StartResponse> {
        let pid = self.0.start_process(&request.exec_id).await.map_err(status)?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> Answer<api::DeleteResponse> {
        let (pid, exit) = self.0.delete_process(&request.exec_id).await.map_err(status)?;
        let exited_at = MessageField::some(clock::timestamp(exit.at));
        Ok(api::DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, _: api::PidsRequest) -> Answer<api::PidsResponse> {
        let pids = self.0.pids().await.map_err(status)?;
        let processes = pids.into_iter().map(|pid| api::ProcessInfo { pid, ..Default::default() }).collect();
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, _: api::PauseRequest) -> Answer<api::Empty> {
        self.0.pause(true).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, _: api::ResumeRequest) -> Answer<api::Empty> {
        self.0.pause(false).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> Answer<api::Empty> {
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
            Code::UNIMPLEMENTED,
            "a sandbox cannot be checkpointed",
        )))
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Answer<api::Empty> {
        self.0.kill(request).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Answer<api::Empty> {
        self.0.add_exec(request).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> Answer<api::Empty> {
        self.0.resize(request).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Answer<api::Empty> {
        self.0.close_io(&request).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Answer<api::Empty> {
        self.0.update(request).await.map_err(status)?;
        Ok(api::Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Answer<api::WaitResponse> {
        let exit = self.0.wait(&request.exec_id).await.map_err(status)?;
        let exited_at = MessageField::some(clock::timestamp(exit.at));
        Ok(api::WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, _: api::StatsRequest) -> Answer<api::StatsResponse> {
        self.0.stats().await.map_err(status)
    }

    async fn connect(&self, _: &TtrpcContext, _: api::ConnectRequest) -> Answer<api::ConnectResponse> {
        self.0.connect().await.map_err(status)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Answer<api::Empty> {
        if self.0.is_over().await {
            self.0.shutdown.notify_one();
        }
        Ok(api::Empty::new())
    }
}

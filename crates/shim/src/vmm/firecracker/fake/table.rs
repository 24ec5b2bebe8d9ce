//! Firecracker's API as it is published: `src/firecracker/swagger/firecracker.yaml` of version 1.17, less what has no
//! bearing on a sandbox (MMDS, balloon, memory hot-plug, pmem). Everything below is the same since version 1.7,
//! except where a comment says so; the driver may use nothing that is newer.

use serde_json::{Map, Value};

/// What a property's value may be.
pub(super) enum Kind {
    Text,
    Flag,
    Whole { min: u64, max: u64 },
    OneOf(&'static [&'static str]),
    Object(&'static [Property]),
}

pub(super) struct Property {
    name: &'static str,
    required: bool,
    kind: Kind,
}

/// When an operation is allowed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Any,
    BeforeBoot,
    AfterBoot,
}

pub(super) struct Operation {
    pub(super) method: &'static str,
    /// `{}` stands for an id, which the property named beside it must repeat.
    pub(super) path: &'static str,
    id: Option<&'static str>,
    pub(super) phase: Phase,
    /// None for operations that take no body.
    body: Option<&'static [Property]>,
}

const fn must(name: &'static str, kind: Kind) -> Property {
    Property { name, required: true, kind }
}

const fn may(name: &'static str, kind: Kind) -> Property {
    Property { name, required: false, kind }
}

const fn get(path: &'static str) -> Operation {
    Operation { method: "GET", path, id: None, phase: Phase::Any, body: None }
}

const fn put(path: &'static str, phase: Phase, body: &'static [Property]) -> Operation {
    Operation { method: "PUT", path, id: None, phase, body: Some(body) }
}

const fn patch(path: &'static str, phase: Phase, body: &'static [Property]) -> Operation {
    Operation { method: "PATCH", path, id: None, phase, body: Some(body) }
}

const fn named(id: &'static str, operation: Operation) -> Operation {
    Operation { id: Some(id), ..operation }
}

const COUNT: Kind = Kind::Whole { min: 0, max: i64::MAX as u64 };

const BUCKET: Kind =
    Kind::Object(&[must("refill_time", COUNT), must("size", COUNT), may("one_time_burst", COUNT)]);
const LIMITER: Kind = Kind::Object(&[may("bandwidth", BUCKET), may("ops", BUCKET)]);
const HUGE: Kind = Kind::OneOf(&["None", "2M"]);
const TEMPLATE: Kind = Kind::OneOf(&["C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"]);

const MACHINE: &[Property] = &[
    must("mem_size_mib", Kind::Whole { min: 1, max: u32::MAX as u64 }),
    must("vcpu_count", Kind::Whole { min: 1, max: 32 }),
    may("smt", Kind::Flag),
    may("track_dirty_pages", Kind::Flag),
    may("cpu_template", TEMPLATE),
    may("huge_pages", HUGE),
];

const BOOT_SOURCE: &[Property] =
    &[must("kernel_image_path", Kind::Text), may("initrd_path", Kind::Text), may("boot_args", Kind::Text)];

const DRIVE: &[Property] = &[
    must("drive_id", Kind::Text),
    must("is_root_device", Kind::Flag),
    may("partuuid", Kind::Text),
    may("cache_type", Kind::OneOf(&["Unsafe", "Writeback"])),
    may("is_read_only", Kind::Flag),
    may("path_on_host", Kind::Text),
    may("rate_limiter", LIMITER),
    may("io_engine", Kind::OneOf(&["Sync", "Async"])),
    may("socket", Kind::Text),
];

const DRIVE_UPDATE: &[Property] =
    &[must("drive_id", Kind::Text), may("path_on_host", Kind::Text), may("rate_limiter", LIMITER)];

const INTERFACE: &[Property] = &[
    must("iface_id", Kind::Text),
    must("host_dev_name", Kind::Text),
    may("guest_mac", Kind::Text),
    may("rx_rate_limiter", LIMITER),
    may("tx_rate_limiter", LIMITER),
];

const INTERFACE_UPDATE: &[Property] =
    &[must("iface_id", Kind::Text), may("rx_rate_limiter", LIMITER), may("tx_rate_limiter", LIMITER)];

const VSOCK: &[Property] = &[
    must("guest_cid", Kind::Whole { min: 3, max: u32::MAX as u64 }),
    must("uds_path", Kind::Text),
    may("vsock_id", Kind::Text),
];

const SAVE: &[Property] = &[
    must("mem_file_path", Kind::Text),
    must("snapshot_path", Kind::Text),
    may("snapshot_type", Kind::OneOf(&["Full", "Diff"])),
];

/// `network_overrides` is newer (1.12), as are `vsock_override`, `clock_realtime` and `huge_pages`.
const LOAD: &[Property] = &[
    must("snapshot_path", Kind::Text),
    may("mem_file_path", Kind::Text),
    may(
        "mem_backend",
        Kind::Object(&[
            must("backend_type", Kind::OneOf(&["File", "Uffd"])),
            must("backend_path", Kind::Text),
        ]),
    ),
    may("enable_diff_snapshots", Kind::Flag),
    may("resume_vm", Kind::Flag),
];

const LOGGER: &[Property] = &[
    may("level", Kind::OneOf(&["Error", "Warning", "Info", "Debug", "Trace", "Off"])),
    may("log_path", Kind::Text),
    may("show_level", Kind::Flag),
    may("show_log_origin", Kind::Flag),
    may("module", Kind::Text),
];

const ACTION: &[Property] =
    &[must("action_type", Kind::OneOf(&["FlushMetrics", "InstanceStart", "SendCtrlAltDel"]))];

pub(super) const OPERATIONS: &[Operation] = &[
    get("/"),
    get("/version"),
    get("/machine-config"),
    get("/vm/config"),
    put("/actions", Phase::Any, ACTION),
    put("/boot-source", Phase::BeforeBoot, BOOT_SOURCE),
    named("drive_id", put("/drives/{}", Phase::BeforeBoot, DRIVE)),
    named("drive_id", patch("/drives/{}", Phase::AfterBoot, DRIVE_UPDATE)),
    put("/entropy", Phase::BeforeBoot, &[may("rate_limiter", LIMITER)]),
    put("/logger", Phase::BeforeBoot, LOGGER),
    put("/machine-config", Phase::BeforeBoot, MACHINE),
    put("/metrics", Phase::BeforeBoot, &[must("metrics_path", Kind::Text)]),
    named("iface_id", put("/network-interfaces/{}", Phase::BeforeBoot, INTERFACE)),
    named("iface_id", patch("/network-interfaces/{}", Phase::AfterBoot, INTERFACE_UPDATE)),
    put("/snapshot/create", Phase::AfterBoot, SAVE),
    put("/snapshot/load", Phase::BeforeBoot, LOAD),
    patch("/vm", Phase::AfterBoot, &[must("state", Kind::OneOf(&["Paused", "Resumed"]))]),
    put("/vsock", Phase::BeforeBoot, VSOCK),
];

/// The operation that a request is, or the fault message, worded as Firecracker words it.
pub(super) fn find(
    method: &str,
    path: &str,
    body: Option<&[u8]>,
) -> Result<(&'static Operation, Value), String> {
    let found = OPERATIONS.iter().find_map(|operation| {
        (operation.method == method)
            .then(|| matches(operation.path, path))
            .flatten()
            .map(|id| (operation, id))
    });
    let Some((operation, id)) = found else {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        return Err(format!("Invalid request method and/or path: {method} {first}."));
    };
    let properties = match (operation.body, body) {
        (None, None) => return Ok((operation, Value::Null)),
        (None, Some(_)) => return Err(format!("{method} request cannot have a body.")),
        (Some(_), None) => return Err(format!("Empty {method} request.")),
        (Some(properties), Some(_)) => properties,
    };
    let json =
        |why: String| format!("An error occurred when deserializing the json body of a request: {why}.");
    let value: Value = serde_json::from_slice(body.unwrap_or_default()).map_err(|e| json(e.to_string()))?;
    check(&value, properties).map_err(json)?;
    if !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err("API Resource IDs can only contain alphanumeric characters and underscores.".into());
    }
    if operation.id.is_some_and(|name| value[name] != id) {
        return Err("The id from the path does not match the id from the body!".into());
    }
    Ok((operation, value))
}

/// The id in `path`, which is empty where the pattern has none.
fn matches<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    match pattern.strip_suffix("{}") {
        Some(start) => path.strip_prefix(start).filter(|id| !id.is_empty() && !id.contains('/')),
        None => (pattern == path).then_some(""),
    }
}

fn check(value: &Value, properties: &[Property]) -> Result<(), String> {
    let object: &Map<String, Value> = value.as_object().ok_or("invalid type: expected struct")?;
    for (key, value) in object {
        let property = properties.iter().find(|property| property.name == key);
        let property = property.ok_or_else(|| format!("unknown field `{key}`"))?;
        check_kind(value, &property.kind).map_err(|why| format!("{key}: {why}"))?;
    }
    match properties.iter().find(|property| property.required && !object.contains_key(property.name)) {
        Some(missing) => Err(format!("missing field `{}`", missing.name)),
        None => Ok(()),
    }
}

fn check_kind(value: &Value, kind: &Kind) -> Result<(), String> {
    let fits = match kind {
        Kind::Text => value.is_string(),
        Kind::Flag => value.is_boolean(),
        Kind::Whole { min, max } => value.as_u64().is_some_and(|number| (*min..=*max).contains(&number)),
        Kind::OneOf(words) => value.as_str().is_some_and(|word| words.contains(&word)),
        Kind::Object(properties) => return check(value, properties),
    };
    if fits { Ok(()) } else { Err(format!("invalid value: {value}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(method: &str, path: &str, body: &str) -> String {
        find(method, path, Some(body.as_bytes())).err().unwrap_or_default()
    }

    #[test]
    fn what_is_not_published_is_refused() {
        assert!(find("GET", "/version", None).is_ok());
        assert_eq!(fault("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#), "");
        for (method, path, body, why) in [
            ("PUT", "/nonsense", "{}", "Invalid request method and/or path: PUT nonsense."),
            ("POST", "/vm", "{}", "Invalid request method"),
            ("PUT", "/drives/a/b", "{}", "Invalid request method"),
            ("PUT", "/vm", r#"{"state": "Paused"}"#, "Invalid request method"),
            ("PUT", "/actions", "", "deserializing"),
            ("PUT", "/actions", "[]", "expected struct"),
            ("PUT", "/actions", r#"{"action_type": "Explode"}"#, "invalid value"),
            ("PUT", "/vsock", r#"{"guest_cid": 3}"#, "missing field `uds_path`"),
            ("PUT", "/vsock", r#"{"guest_cid": 2, "uds_path": "v"}"#, "guest_cid"),
            ("PUT", "/vsock", r#"{"guest_cid": "3", "uds_path": "v"}"#, "guest_cid"),
            ("PUT", "/vsock", r#"{"guest_cid": 3, "uds_path": "v", "x": 1}"#, "unknown field `x`"),
            ("PUT", "/machine-config", r#"{"mem_size_mib": 1, "vcpu_count": 33}"#, "vcpu_count"),
            ("PUT", "/drives/a", r#"{"drive_id": "b", "is_root_device": false}"#, "does not match"),
            ("PUT", "/drives/a-b", r#"{"drive_id": "a-b", "is_root_device": false}"#, "alphanumeric"),
            (
                "PATCH",
                "/drives/a",
                r#"{"drive_id": "a", "rate_limiter": {"ops": {"size": 1}}}"#,
                "missing field `refill_time`",
            ),
        ] {
            let fault = fault(method, path, body);
            assert!(fault.contains(why), "{method} {path} {body}: {fault}");
        }
    }
}

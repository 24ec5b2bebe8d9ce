//! Usage, as containerd's clients read it: cgroup v2 metrics, whatever the host's own cgroups are.

use bailey_types::guest::message::Stats;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

use crate::error::{Context, Result};

/// The name that containerd's clients know the metrics by.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Packs what the guest counted.
pub(super) fn pack(stats: &Stats) -> Result<Any> {
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids,
            limit: stats.pids_limit,
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_periods,
            nr_throttled: stats.cpu_throttled_periods,
            throttled_usec: stats.cpu_throttled_us,
            ..CPUStat::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: stats.memory_anon_bytes,
            file: stats.memory_file_bytes,
            inactive_file: stats.memory_inactive_file_bytes,
            usage: stats.memory_bytes,
            usage_limit: stats.memory_limit_bytes,
            max_usage: stats.memory_peak_bytes,
            ..MemoryStat::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            oom: stats.memory_oom,
            oom_kill: stats.memory_oom_kill,
            ..MemoryEvents::default()
        }),
        io: MessageField::some(IOStat {
            usage: vec![IOEntry {
                rbytes: stats.io_read_bytes,
                wbytes: stats.io_write_bytes,
                rios: stats.io_reads,
                wios: stats.io_writes,
                ..IOEntry::default()
            }],
            ..IOStat::default()
        }),
        ..Metrics::default()
    };
    let value = metrics.write_to_bytes().context(|| "writing the metrics".into())?;
    Ok(Any { type_url: TYPE_URL.to_owned(), value, ..Any::default() })
}

//! The operating system: the cores and the memory that this process may use.
//!
//! What a system does not tell is None, never a guess.

use std::path::Path;

/// The cores this process may really use: its affinity mask and its cgroup's CPU quota are honoured.
pub fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The CPU's name.
pub fn cpu_name() -> Option<String> {
    let info = read("/proc/cpuinfo")?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The CPU time this process's cgroup may use, in cores.
pub fn cpu_quota() -> Option<f64> {
    let own = |controller: &str| cgroup_folders(controller).into_iter();
    let v2 = own("").filter_map(|folder| {
        let text = read(format!("{folder}/cpu.max"))?;
        let (quota, period) = text.trim().split_once(' ')?;
        Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
    });
    let v1 = own("cpu").filter_map(|folder| {
        let number = |name: &str| read(format!("{folder}/{name}"))?.trim().parse::<f64>().ok();
        let quota = number("cpu.cfs_quota_us").filter(|quota| *quota > 0.0)?;
        Some(quota / number("cpu.cfs_period_us")?)
    });
    v2.chain(v1).reduce(f64::min)
}

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All that the machine, or this process's cgroup, has.
    pub total: u64,
    /// What could be had without swapping.
    pub available: u64,
}

/// The memory that this process may use: the machine's, or its cgroup's where that is less.
pub fn memory() -> Option<Memory> {
    let info = read("/proc/meminfo")?;
    let bytes = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let mut memory = Memory { total: bytes("MemTotal")?, available: bytes("MemAvailable")? };
    let files =
        [("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")];
    for (controller, limit, used) in files {
        for folder in cgroup_folders(controller) {
            let number = |name: &str| read(format!("{folder}/{name}"))?.trim().parse::<u64>().ok();
            if let (Some(limit), Some(used)) = (number(limit), number(used)) {
                memory.total = memory.total.min(limit);
                memory.available = memory.available.min(limit.saturating_sub(used));
            }
        }
    }
    Some(memory)
}

/// This process's cgroup and those above it, for a v1 controller or, with "", for v2.
fn cgroup_folders(controller: &str) -> Vec<String> {
    let Some(groups) = read("/proc/self/cgroup") else { return Vec::new() };
    let own = groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        controllers.split(',').any(|name| name == controller).then_some(path.trim_end_matches('/'))
    });
    let Some(own) = own else { return Vec::new() };
    let root =
        if controller.is_empty() { "/sys/fs/cgroup".into() } else { format!("/sys/fs/cgroup/{controller}") };
    let above = own.match_indices('/').map(|(end, _)| &own[..end]);
    above.chain([own]).map(|path| format!("{root}{path}")).collect()
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_core_and_memory_is_within_its_total() {
        assert!(usable_cores() >= 1);
        if let Some(memory) = memory() {
            assert!(memory.available <= memory.total);
        }
        if let Some(quota) = cpu_quota() {
            assert!(quota > 0.0);
        }
    }
}

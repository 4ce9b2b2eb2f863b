//! The operating system: the cores and the memory that this process may use, and forks.
//!
//! A value that the system does not report is None, never a guess.

pub mod panics;
mod platform;
pub mod reserve;
pub mod sync;

use std::path::{Path, PathBuf};

/// The number of cores that this process may really use. It respects the affinity mask and the cgroup's CPU
/// quota. A quota of 1.5 cores counts as one: a second thread would be stopped half of the time.
pub fn usable_cores() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match cpu_quota() {
        Some(quota) => cores.min((quota as usize).max(1)),
        None => cores,
    }
}

/// The number of threads that compute if the caller names none: the usable cores or, on a processor with two
/// kinds of cores, the performance cores among them. A kernel ends when its slowest thread does, so threads
/// on slower cores would make the others wait.
pub fn default_threads() -> usize {
    let fast = Files::of_the_system().performance_cores().or_else(platform::performance_cores);
    fast.unwrap_or(usize::MAX).min(usable_cores())
}

/// The CPU's name.
pub fn cpu_name() -> Option<String> {
    let info = Files::of_the_system().read("/proc/cpuinfo")?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The CPU time that this process's cgroup may use, in cores.
pub fn cpu_quota() -> Option<f64> {
    Files::of_the_system().cpu_quota()
}

/// Memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All memory of the machine, or the limit of this process's cgroup if that is smaller.
    pub total: u64,
    /// Memory that can still be allocated without swapping.
    pub available: u64,
    /// Further memory that can be allocated by swapping.
    pub swap: u64,
}

/// The memory that this process may use: the machine's, or its cgroup's if that is less.
pub fn memory() -> Option<Memory> {
    Files::of_the_system().memory()
}

/// The bytes that this process may still map or allocate before it reaches its limit of address space
/// (`ulimit -v`). None without a limit.
pub fn address_space_left() -> Option<u64> {
    let limit = platform::address_space_limit()?;
    let status = Files::of_the_system().read("/proc/self/status")?;
    Some(limit.saturating_sub(kibibytes(&status, "VmSize")?))
}

/// Whether this is the process's first thread, on which Python runs signal handlers; true where the system
/// does not say.
pub fn is_main_thread() -> bool {
    platform::is_main_thread().unwrap_or(true)
}

/// The process that created an object. A forked child is a different process: it has a copy of the memory but
/// none of the other threads, so a lock that one of them held is never released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(u32);

impl Process {
    /// This process.
    pub fn current() -> Self {
        Process(std::process::id())
    }

    /// Whether this code runs in that process.
    pub fn is_current(self) -> bool {
        self == Process::current()
    }
}

/// The most cores that Linux can be built for.
const MAX_CORES: usize = 8192;

/// The files in which Linux reports what a process may use.
struct Files {
    /// `/`, or in tests a folder with copies of the files.
    root: PathBuf,
}

impl Files {
    fn of_the_system() -> Self {
        Files { root: "/".into() }
    }

    fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        let path = path.as_ref();
        std::fs::read_to_string(self.root.join(path.strip_prefix("/").unwrap_or(path))).ok()
    }

    fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.read(path)?.trim().parse().ok()
    }

    fn cpu_quota(&self) -> Option<f64> {
        let v2 = self.cgroup_folders("").into_iter().filter_map(|folder| {
            let text = self.read(format!("{folder}/cpu.max"))?;
            let (quota, period) = text.trim().split_once(' ')?;
            Some((quota.parse::<f64>().ok()?, period.parse::<f64>().ok()?))
        });
        let v1 = self.cgroup_folders("cpu").into_iter().filter_map(|folder| {
            // -1 means no quota.
            let number = |name: &str| Some(self.number(format!("{folder}/{name}"))? as f64);
            Some((number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?))
        });
        let quotas = v2.chain(v1).filter(|&(quota, period)| quota > 0.0 && period > 0.0);
        quotas.map(|(quota, period)| quota / period).reduce(f64::min)
    }

    /// The performance cores of this thread's affinity mask: those with at least half the capacity of the
    /// fastest one. Linux gives each core's capacity, from 1 to 1024, where cores differ.
    fn performance_cores(&self) -> Option<usize> {
        let status = self.read("/proc/thread-self/status")?;
        let allowed = text_after(&status, "Cpus_allowed_list")?;
        let ranges = allowed.trim().split(',').map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
        });
        let ranges = ranges.collect::<Option<Vec<_>>>()?;
        let cores = (0..MAX_CORES).filter(|core| ranges.iter().any(|range| range.contains(core)));
        // The mask may have cores that the machine does not have.
        let capacities: Vec<u64> = cores
            .filter_map(|core| self.number(format!("/sys/devices/system/cpu/cpu{core}/cpu_capacity")))
            .collect();
        let most = capacities.iter().max()?;
        Some(capacities.iter().filter(|&capacity| *capacity >= most / 2).count())
    }

    fn memory(&self) -> Option<Memory> {
        let info = self.read("/proc/meminfo")?;
        let mut memory = Memory {
            total: kibibytes(&info, "MemTotal")?,
            available: kibibytes(&info, "MemAvailable")?,
            swap: kibibytes(&info, "SwapFree").unwrap_or(0),
        };
        for folder in self.cgroup_folders("") {
            let number = |name: &str| self.number(format!("{folder}/{name}"));
            if let (Some(limit), Some(used)) = (number("memory.max"), number("memory.current")) {
                let reclaimable = self.reclaimable(&folder, ["inactive_file", "active_file"]);
                memory.limit(limit, used.saturating_sub(reclaimable));
            }
            if let (Some(limit), Some(used)) = (number("memory.swap.max"), number("memory.swap.current")) {
                memory.swap = memory.swap.min(limit.saturating_sub(used));
            }
        }
        for folder in self.cgroup_folders("memory") {
            let number = |name: &str| self.number(format!("{folder}/{name}"));
            let reclaimable = self.reclaimable(&folder, ["total_inactive_file", "total_active_file"]);
            let bound =
                |limit: &str, used: &str| Some((number(limit)?, number(used)?.saturating_sub(reclaimable)));
            if let Some((limit, used)) = bound("memory.limit_in_bytes", "memory.usage_in_bytes") {
                memory.limit(limit, used);
            }
            // This limit covers memory and swap together.
            if let Some((limit, used)) = bound("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes") {
                let left = limit.saturating_sub(used);
                memory.available = memory.available.min(left);
                memory.swap = memory.swap.min(left - memory.available);
            }
        }
        Some(memory)
    }

    /// Bytes of a cgroup's memory that only cache files. The kernel frees them when memory is needed.
    fn reclaimable(&self, folder: &str, names: [&str; 2]) -> u64 {
        let stat = self.read(format!("{folder}/memory.stat")).unwrap_or_default();
        let value = |line: &str| {
            let (name, value) = line.split_once(' ')?;
            names.contains(&name).then(|| value.trim().parse::<u64>().ok())?
        };
        stat.lines().filter_map(value).fold(0, u64::saturating_add)
    }

    /// The folders of this process's cgroup and its ancestors, for a v1 controller or, with "", for v2. A
    /// container often sees its own cgroup as the root, while `/proc/self/cgroup` gives the path on the host.
    /// Folders that do not exist are skipped when their files are read.
    fn cgroup_folders(&self, controller: &str) -> Vec<String> {
        let Some(groups) = self.read("/proc/self/cgroup") else { return Vec::new() };
        let own = groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers.split(',').any(|name| name == controller).then_some(path.trim_end_matches('/'))
        });
        let Some(own) = own else { return Vec::new() };
        let root = if controller.is_empty() {
            "/sys/fs/cgroup".into()
        } else {
            format!("/sys/fs/cgroup/{controller}")
        };
        let above = own.match_indices('/').map(|(end, _)| &own[..end]);
        above.chain([own]).map(|path| format!("{root}{path}")).collect()
    }
}

impl Memory {
    fn limit(&mut self, limit: u64, used: u64) {
        self.total = self.total.min(limit);
        self.available = self.available.min(limit.saturating_sub(used));
    }
}

/// What follows `key` and a colon on its line.
fn text_after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
}

/// The value, in bytes, of a line such as `MemTotal:  24 kB`.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let value = text_after(text, key)?.trim().strip_suffix("kB")?;
    value.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A folder with copies of the system's files.
    fn files(contents: &[(&str, &str)]) -> (tempfile::TempDir, Files) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in contents {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let files = Files { root: root.path().into() };
        (root, files)
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\nSwapFree:  2097152 kB\n",
    );

    #[test]
    fn at_least_one_core_and_available_memory_within_the_total() {
        assert!(usable_cores() >= 1);
        assert!((1..=usable_cores()).contains(&default_threads()));
        if let Some(memory) = memory() {
            assert!(memory.available <= memory.total);
        }
        if let Some(quota) = cpu_quota() {
            assert!(quota > 0.0);
        }
    }

    #[test]
    fn only_this_process_is_current() {
        assert!(Process::current().is_current());
        assert!(!Process(u32::MAX).is_current());
    }

    #[test]
    fn the_smallest_quota_among_the_cgroup_and_its_ancestors_counts() {
        let quota = |contents: &[(&str, &str)]| files(contents).1.cpu_quota();
        let nested = ("proc/self/cgroup", "0::/outer/inner\n");
        assert_eq!(quota(&[nested]), None, "no limit is reported");
        assert_eq!(quota(&[nested, ("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n")]), None);
        let inner = ("sys/fs/cgroup/outer/inner/cpu.max", "150000 100000\n");
        assert_eq!(quota(&[nested, inner]), Some(1.5));
        let outer = ("sys/fs/cgroup/outer/cpu.max", "50000 100000\n");
        assert_eq!(quota(&[nested, inner, outer]), Some(0.5));
        // A container that sees its own cgroup as the root.
        assert_eq!(quota(&[nested, ("sys/fs/cgroup/cpu.max", "300000 100000\n")]), Some(3.0));
        assert_eq!(quota(&[nested, ("sys/fs/cgroup/cpu.max", "300000 0\n")]), None, "no division by zero");
        assert_eq!(quota(&[nested, ("sys/fs/cgroup/cpu.max", "nonsense")]), None);
    }

    #[test]
    fn cgroup_version_1_quotas_count() {
        let groups = ("proc/self/cgroup", "7:cpu,cpuacct:/docker/abc\n4:memory:/\n");
        let quota = |value: &str, folder: &str| {
            let quota = format!("sys/fs/cgroup/cpu{folder}/cpu.cfs_quota_us");
            let period = format!("sys/fs/cgroup/cpu{folder}/cpu.cfs_period_us");
            files(&[groups, (&quota, value), (&period, "100000\n")]).1.cpu_quota()
        };
        assert_eq!(quota("-1\n", ""), None);
        assert_eq!(quota("200000\n", ""), Some(2.0));
        assert_eq!(quota("200000\n", "/docker/abc"), Some(2.0));
        assert_eq!(quota("200000\n", "/somebody/else"), None);
    }

    #[test]
    fn performance_cores_have_at_least_half_the_capacity_of_the_fastest_that_is_allowed() {
        let capacity = |core: usize| match core {
            0..4 => "402\n",
            4..7 => "871\n",
            _ => "1024\n",
        };
        let paths = [0, 1, 2, 3, 4, 5, 6, 7]
            .map(|core| (format!("sys/devices/system/cpu/cpu{core}/cpu_capacity"), capacity(core)));
        let fast = |allowed: &str| {
            let status = format!("Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}\n");
            let mut contents = vec![("proc/thread-self/status", status.as_str())];
            contents.extend(paths.iter().map(|(path, text)| (path.as_str(), *text)));
            files(&contents).1.performance_cores()
        };
        assert_eq!(fast("0-7"), Some(4));
        assert_eq!(fast("0-127"), Some(4), "the mask may have cores that the machine does not have");
        assert_eq!(fast("0-2,5,7"), Some(2));
        assert_eq!(fast("0-3"), Some(4), "only slow cores are allowed");
        assert_eq!(fast("4"), Some(1));
        for nonsense in ["", "x", "3-", "-3", "18446744073709551616", "7-0"] {
            assert_eq!(fast(nonsense), None, "{nonsense}");
        }
        assert_eq!(fast("0-18446744073709551615"), Some(4), "bounded");
        let alike = [("proc/thread-self/status", "Cpus_allowed_list:\t0-7\n")];
        assert_eq!(files(&alike).1.performance_cores(), None, "cores are alike");
        assert_eq!(files(&[]).1.performance_cores(), None);
    }

    #[test]
    fn without_a_cgroup_memory_is_the_machines() {
        let expected = Memory { total: 16 * GIB, available: 8 * GIB, swap: 2 * GIB };
        assert_eq!(files(&[MEMINFO]).1.memory(), Some(expected));
        let unlimited = [MEMINFO, ("proc/self/cgroup", "0::/"), ("sys/fs/cgroup/memory.max", "max\n")];
        assert_eq!(files(&unlimited).1.memory(), Some(expected));
        assert_eq!(files(&[]).1.memory(), None);
    }

    #[test]
    fn a_cgroups_limit_counts_without_cached_files() {
        let limited = [
            MEMINFO,
            ("proc/self/cgroup", "0::/outer/inner\n"),
            ("sys/fs/cgroup/outer/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/outer/memory.current", "3221225472\n"),
            (
                "sys/fs/cgroup/outer/memory.stat",
                "anon 1073741824\ninactive_file 1073741824\nactive_file 1073741824\n",
            ),
            ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
            ("sys/fs/cgroup/outer/inner/memory.swap.max", "1073741824\n"),
            ("sys/fs/cgroup/outer/inner/memory.swap.current", "1073741824\n"),
        ];
        let expected = Memory { total: 4 * GIB, available: 3 * GIB, swap: 0 };
        assert_eq!(files(&limited).1.memory(), Some(expected));
    }

    #[test]
    fn cgroup_version_1_limits_memory_and_swap_together() {
        let limited = |together: &str| {
            let contents = [
                MEMINFO,
                ("proc/self/cgroup", "4:memory:/jobs/1\n"),
                ("sys/fs/cgroup/memory/jobs/1/memory.limit_in_bytes", "2147483648\n"),
                ("sys/fs/cgroup/memory/jobs/1/memory.usage_in_bytes", "1073741824\n"),
                ("sys/fs/cgroup/memory/jobs/1/memory.stat", "total_inactive_file 536870912\n"),
                ("sys/fs/cgroup/memory/jobs/1/memory.memsw.limit_in_bytes", together),
                ("sys/fs/cgroup/memory/jobs/1/memory.memsw.usage_in_bytes", "1073741824\n"),
            ];
            files(&contents).1.memory().unwrap()
        };
        let half = GIB / 2;
        assert_eq!(
            limited("9223372036854771712\n"),
            Memory { total: 2 * GIB, available: 3 * half, swap: 2 * GIB }
        );
        assert_eq!(limited("3221225472\n"), Memory { total: 2 * GIB, available: 3 * half, swap: GIB });
        assert_eq!(limited("2147483648\n"), Memory { total: 2 * GIB, available: 3 * half, swap: 0 });
    }
}

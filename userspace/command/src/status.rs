// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vmgenid status`.

use crate::{
    limit,
    record::{Found, State},
};
use anyhow::Result;
use serde::Serialize;
use std::{fs, path::Path, process::ExitCode};
use vmgenid::{Counter, Error, Source};

#[derive(Serialize)]
struct Status {
    kernel: String,
    /// The module that is loaded.
    module: Option<String>,
    /// Whether the hypervisor gives the machine a generation ID.
    generation_id: bool,
    /// The source that the other commands use.
    source: Option<String>,
    sources: Vec<Node>,
    identity: Identity,
}

#[derive(Serialize)]
struct Node {
    source: String,
    path: String,
    /// The permissions, in octal.
    mode: Option<String>,
    generation: Option<String>,
    barrier: bool,
    /// What the source cannot promise.
    limit: Option<&'static str>,
    /// Why it is not usable.
    why_not: Option<String>,
}

/// What `vmgenid renew` has recorded.
#[derive(Serialize)]
struct Identity {
    /// `None`: unknown.
    renewed: Option<bool>,
    record: Option<State>,
    why_unknown: Option<String>,
}

pub fn print(json: bool, state: &Path) -> Result<ExitCode> {
    let status = Status::new(state);
    if json {
        crate::print(&serde_json::to_string(&status)?)?;
    } else {
        crate::print(&status.lines().join("\n"))?;
    }
    Ok(match (&status.source, status.identity.renewed) {
        (None, _) => ExitCode::from(3),
        (_, Some(false)) => ExitCode::from(4),
        _ => ExitCode::SUCCESS,
    })
}

impl Status {
    fn new(state: &Path) -> Self {
        let sources: Vec<_> = Source::ALL
            .iter()
            .map(|source| Node::new(*source))
            .collect();
        let first = sources.iter().find(|node| node.generation.is_some());
        let source = first.map(|node| node.source.clone());
        let identity = Identity::new(state, first);
        Self {
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
            module: module(),
            generation_id: has_generation_id(),
            source,
            sources,
            identity,
        }
    }

    fn lines(&self) -> Vec<String> {
        let module = match (&self.module, self.generation_id) {
            (Some(module), _) => module.clone(),
            (None, true) => {
                "not loaded: modprobe vmgenid; if the kernel's own driver is built in, vmgenctr"
                    .into()
            }
            (None, false) => {
                "not loaded: the hypervisor gives this machine no generation ID".into()
            }
        };
        let mut lines = vec![
            format!("kernel: {}", self.kernel),
            format!("module: {module}"),
        ];
        for node in &self.sources {
            let says = match (&node.generation, &node.why_not) {
                (Some(generation), _) => format!(
                    "generation {generation}, {}",
                    node.limit.unwrap_or("a read is a barrier")
                ),
                (None, Some(why)) => why.clone(),
                (None, None) => String::new(),
            };
            let mode = node.mode.as_ref().map(|mode| format!(" (mode {mode})"));
            lines.push(format!("{}{}: {says}", node.path, mode.unwrap_or_default()));
        }
        lines.push(format!(
            "used: {}",
            self.source.as_deref().unwrap_or("none")
        ));
        lines.extend(self.identity.lines());
        lines
    }
}

impl Node {
    fn new(source: Source) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let path = source.path();
        let opened = Counter::open_path(source, path).and_then(|counter| counter.barrier());
        let mode = fs::metadata(path).map(|file| file.permissions().mode() & 0o7777);
        Self {
            source: source.to_string(),
            path: path.into(),
            mode: mode.ok().map(|mode| format!("{mode:04o}")),
            generation: opened.as_ref().ok().map(ToString::to_string),
            barrier: source.has_barrier(),
            limit: limit(source),
            why_not: opened.err().map(|err| match err {
                Error::Open { error, .. } => error.to_string(),
                err => err.to_string(),
            }),
        }
    }
}

impl Identity {
    fn new(path: &Path, node: Option<&Node>) -> Self {
        let (record, why_unknown) = match State::read(path) {
            Ok(Found::State(state)) => (Some(state), None),
            Ok(Found::Damaged) => (None, Some(format!("{} is damaged", path.display()))),
            Ok(Found::Nothing) => (None, Some(format!("there is no {}", path.display()))),
            Err(err) => (None, Some(format!("{err:#}"))),
        };
        let renewed = record.as_ref().zip(node).map(|(record, node)| {
            !record.due && Some(&record.generation) == node.generation.as_ref()
        });
        Self {
            renewed,
            record,
            why_unknown,
        }
    }

    fn lines(&self) -> Vec<String> {
        let (Some(record), Some(renewed)) = (&self.record, self.renewed) else {
            let why = self.why_unknown.as_deref().unwrap_or("no source");
            return vec![format!("renewed: unknown: {why}")];
        };
        let not = if renewed { "yes" } else { "no" };
        let mut lines = vec![format!("renewed: {not}, generation {}", record.generation)];
        let done = record.done.iter().map(|name| format!("  {name}: done"));
        let failed = record
            .failed
            .iter()
            .map(|(name, how)| format!("  {name}: {how}"));
        lines.extend(done.chain(failed));
        lines
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().into())
}

/// Both modules cannot be loaded at once: each excludes the other by the kernel's configuration.
fn module() -> Option<String> {
    ["vmgenctr", "vmgenid"].into_iter().find_map(|name| {
        // What is built into the kernel has no such file.
        read(&format!("/sys/module/{name}/initstate"))?;
        let version = read(&format!("/sys/module/{name}/version"));
        Some(version.map_or(name.into(), |version| format!("{name} {version}")))
    })
}

fn has_generation_id() -> bool {
    let devices = fs::read_dir("/sys/bus/acpi/devices").into_iter().flatten();
    devices.flatten().any(|device| {
        let modalias = fs::read_to_string(device.path().join("modalias")).unwrap_or_default();
        let mut ids = modalias.trim().split(':');
        ids.any(|id| matches!(id, "VMGENCTR" | "VM_GEN_COUNTER"))
    })
}

//! The architecture, held by a test: dependency edges, purity, rooms, the file budget, and a code map
//! that names what exists. `docs/ARCHITECTURE.md` explains it to people.
#![expect(clippy::expect_used, reason = "a test that cannot read the tree has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Who may depend on whom inside the workspace: exactly this, nothing more and nothing less.
const EDGES: &[(&str, &[&str])] = &[
    ("net", &[]),
    ("store", &["net"]),
    ("state", &["net"]),
    ("cni", &["net"]),
    ("ipam", &["net", "store"]),
    ("intent", &["net", "state"]),
    ("program", &["net", "state", "intent"]),
    ("trace", &["net", "state", "intent", "program"]),
    ("dns", &["net", "state", "intent"]),
    ("kernel", &["net", "program"]),
    ("source", &["net", "state", "store", "ipam"]),
    ("apiserver", &["net", "store"]),
    ("agent", &["net", "store", "state", "ipam", "intent", "program", "trace", "dns", "cni", "kernel", "source"]),
    ("plugin", &["cni"]),
    ("lab", &["net", "kernel", "apiserver"]),
    ("cli", &["agent", "apiserver", "lab", "trace", "plugin", "net"]),
];

/// Crates without side effects, and the folders of others that are exempt because they are not the core.
const PURE: &[(&str, &[&str])] = &[
    ("net", &[]),
    ("state", &[]),
    ("intent", &[]),
    ("program", &[]),
    ("trace", &[]),
    ("cni", &[]),
    ("ipam", &["io"]),
    ("dns", &["io"]),
];

/// What has an effect, or a different result at another time.
const EFFECTS: &[&str] = &[
    "tokio::",
    "std::fs",
    "std::process",
    "std::env",
    "Instant::now",
    "SystemTime::now",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "UnixListener",
    "thread_rng",
    "rand::",
    "std::thread",
];

/// Libraries that only one crate may see, so that a change of theirs is a change in one place.
const CONFINED: &[(&str, &[&str])] = &[
    ("kube", &["source"]),
    ("k8s-openapi", &["source"]),
    ("redb", &["store"]),
    ("hickory-proto", &["dns"]),
    ("rcgen", &["apiserver"]),
    ("libc", &["kernel"]),
    ("rustix", &["plugin"]),
];

const LINES_PER_FILE_MAX: usize = 600;
const SCENARIO_BYTES_MAX: u64 = 2 << 20;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

fn metadata() -> Metadata {
    MetadataCommand::new().current_dir(root()).no_deps().exec().expect("cargo metadata")
}

fn short(name: &str) -> String {
    if name == "portolan" { "cli".into() } else { name.trim_start_matches("portolan-").into() }
}

fn crate_directory(name: &str) -> PathBuf {
    root().join("crates").join(name)
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![directory.to_path_buf()];
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

fn is_test_file(path: &Path) -> bool {
    path.iter().any(|part| part == "tests" || part == "tests.rs" || part == "benches" || part == "examples")
}

/// The part of a file that is not its test module, without comments.
fn code_of(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a readable source file");
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn dependencies_go_one_way() {
    let expected: BTreeMap<String, BTreeSet<String>> =
        EDGES.iter().map(|(from, to)| ((*from).to_owned(), to.iter().map(|it| (*it).to_owned()).collect())).collect();
    let mut found = BTreeMap::new();
    for package in metadata().workspace_packages() {
        if package.name.as_str() == "xtask" {
            continue;
        }
        let ours = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind != DependencyKind::Build && dependency.path.is_some())
            .map(|dependency| short(&dependency.name))
            .collect();
        found.insert(short(&package.name), ours);
    }
    assert_eq!(found, expected, "the dependency edges changed: change DESIGN and EDGES together or undo it");
}

#[test]
fn pure_crates_have_no_effects() {
    let mut offences = Vec::new();
    for (name, exempt) in PURE {
        let source = crate_directory(name).join("src");
        for file in rust_files(&source) {
            let inside = file.strip_prefix(&source).expect("inside");
            let is_exempt = inside
                .iter()
                .next()
                .is_some_and(|first| exempt.iter().any(|it| first == *it || first == format!("{it}.rs").as_str()));
            if is_exempt || is_test_file(&file) {
                continue;
            }
            let code = code_of(&file);
            for effect in EFFECTS.iter().filter(|effect| code.contains(**effect)) {
                offences.push(format!("{}: {effect}", file.display()));
            }
        }
    }
    assert!(offences.is_empty(), "effects in pure code:\n{}", offences.join("\n"));
}

#[test]
fn libraries_stay_where_they_are_confined() {
    for package in metadata().workspace_packages() {
        let name = short(&package.name);
        for dependency in package.dependencies.iter().filter(|it| it.kind == DependencyKind::Normal) {
            if let Some((library, allowed)) = CONFINED.iter().find(|(library, _)| *library == dependency.name) {
                assert!(allowed.contains(&name.as_str()), "{name} depends on {library}, which belongs to {allowed:?}");
            }
        }
    }
}

#[test]
fn rooms_do_not_import_each_other() {
    let source = crate_directory("program").join("src");
    let rooms: Vec<String> = fs::read_dir(&source)
        .expect("crates/program/src")
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    assert!(rooms.len() >= 2, "the rooms have moved: this test looks for them in the wrong place");
    for room in &rooms {
        for file in rust_files(&source.join(room)) {
            let code = code_of(&file);
            for other in rooms.iter().filter(|other| *other != room) {
                let import = format!("crate::{other}");
                assert!(!code.contains(&import), "{} imports {import}", file.display());
            }
        }
    }
}

#[test]
fn every_room_has_its_furniture_twin_and_page() {
    let source = crate_directory("program").join("src");
    for room in ["netlink", "nftables"] {
        for part in ["mod", "program", "compile", "diff", "render", "interpret"] {
            let as_file = source.join(room).join(format!("{part}.rs"));
            let as_folder = source.join(room).join(part);
            assert!(as_file.exists() || as_folder.exists(), "room {room} has no {part}");
        }
        let kernel = crate_directory("kernel").join("src");
        assert!(kernel.join(room).exists() || kernel.join(format!("{room}.rs")).exists(), "{room} has no kernel twin");
        assert!(root().join("docs/design").join(format!("{room}.md")).exists(), "{room} has no design page");
    }
}

#[test]
fn files_keep_the_budget() {
    let mut over = Vec::new();
    for directory in ["crates", "xtask"] {
        for file in rust_files(&root().join(directory)) {
            let lines = fs::read_to_string(&file).expect("a readable source file").lines().count();
            if lines > LINES_PER_FILE_MAX {
                over.push(format!("{} has {lines} lines", file.display()));
            }
        }
    }
    assert!(over.is_empty(), "files over {LINES_PER_FILE_MAX} lines want dividing:\n{}", over.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let mut silent = Vec::new();
    for file in rust_files(&root().join("crates")) {
        let text = fs::read_to_string(&file).expect("a readable source file");
        if !text.trim_start().starts_with("//!") {
            silent.push(file.display().to_string());
        }
    }
    assert!(silent.is_empty(), "files without a //! header:\n{}", silent.join("\n"));
}

#[test]
fn unsafe_code_stays_in_the_kernel_crate() {
    // The plugin's own program has no standard library to call its `main` and to give it the environment.
    for (name, _) in EDGES.iter().filter(|(name, _)| !["kernel", "plugin"].contains(name)) {
        let manifest = fs::read_to_string(crate_directory(name).join("Cargo.toml")).expect("a manifest");
        assert!(manifest.contains("[lints]\nworkspace = true"), "{name} does not take the workspace's lints");
    }
    let plugin = crate_directory("plugin").join("src");
    assert!(code_of(&plugin.join("lib.rs")).contains("#![forbid(unsafe_code)]"), "the plugin's library may not");
    for file in rust_files(&plugin).iter().filter(|file| **file != plugin.join("main.rs")) {
        let code = code_of(file).replace("#![forbid(unsafe_code)]", "");
        assert!(!code.contains("unsafe"), "{} uses unsafe; only main.rs may", file.display());
    }
}

#[test]
fn scenarios_stay_small() {
    let mut bytes = 0;
    let mut open = vec![root().join("scenarios")];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let metadata = entry.metadata().expect("metadata");
            if metadata.is_dir() {
                open.push(entry.path());
            } else {
                bytes += metadata.len();
            }
        }
    }
    assert!(bytes <= SCENARIO_BYTES_MAX, "scenarios/ holds {bytes} bytes, more than {SCENARIO_BYTES_MAX}");
}

#[test]
fn the_code_map_names_every_crate() {
    let map = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).expect("docs/ARCHITECTURE.md");
    for (name, _) in EDGES {
        assert!(map.contains(&format!("`crates/{name}`")), "docs/ARCHITECTURE.md does not name `crates/{name}`");
    }
    for word in map.split('`').filter(|word| word.starts_with("crates/") && !word.contains('<')) {
        assert!(root().join(word).exists(), "docs/ARCHITECTURE.md names {word}, which does not exist");
    }
}

#[test]
fn links_in_the_documentation_lead_somewhere() {
    let mut pages = vec![root().join("README.md"), root().join("CONTRIBUTING.md")];
    for directory in ["docs", "docs/design", "docs/user"] {
        pages.extend(fs::read_dir(root().join(directory)).into_iter().flatten().flatten().map(|entry| entry.path()));
    }
    for page in pages.iter().filter(|page| page.extension().is_some_and(|it| it == "md")) {
        let text = fs::read_to_string(page).unwrap_or_else(|error| panic!("{}: {error}", page.display()));
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            let target = page.parent().expect("a folder").join(path);
            assert!(target.exists(), "{} links to {path}, which does not exist", page.display());
        }
    }
}

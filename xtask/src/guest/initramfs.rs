//! The archive that the guest's kernel starts from: busybox, a few modules and a script.
//!
//! It is written anew for each run, which takes a few milliseconds: no stale copy can be in the way.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Context;

use super::kernel::filter;

/// What it takes to see this machine's files.
const MODULES: [&str; 5] = ["virtio_mmio", "virtio_console", "9pnet_virtio", "9p", "overlay"];

/// Lays memory over this machine's files and goes on there.
const INIT: &str = include_str!("init.sh");

/// Writes the archive, unless there is one of the same contents.
pub(super) fn write(path: &Path, modules: &Path) -> anyhow::Result<()> {
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "host", "memory", "root", "modules"] {
        archive.directory(directory);
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|path| fs::read(path).ok());
    archive.file("bin/busybox", 0o755, &busybox.context("busybox is missing: apt-get install busybox-static")?);
    archive.symlink("bin/sh", "busybox");
    archive.file("init", 0o755, INIT.as_bytes());
    let mut list = String::new();
    for file in load_order(&fs::read_to_string(modules.join("modules.dep"))?) {
        let bytes = fs::read(modules.join(&file)).with_context(|| format!("module {file} cannot be read"))?;
        let bytes = match file.rsplit('.').next() {
            Some("xz") => filter("xz", &bytes)?,
            Some("zst") => filter("zstd", &bytes)?,
            _ => bytes,
        };
        let name = module_name(&file);
        archive.file(&format!("modules/{name}.ko"), 0o644, &bytes);
        list += &name;
        list.push('\n');
    }
    archive.file("modules/list", 0o644, list.as_bytes());
    let bytes = archive.finish();
    if fs::read(path).is_ok_and(|known| known == bytes) {
        return Ok(());
    }
    let new = path.with_extension("new");
    fs::write(&new, bytes)?;
    Ok(fs::rename(new, path)?)
}

/// The files of the modules that we need, each behind those that it needs (`modules.dep`, depmod(8)). Those
/// that the kernel has built in are not listed.
fn load_order(dependencies: &str) -> Vec<String> {
    let mut order = Vec::new();
    let mut known = BTreeSet::new();
    for wanted in MODULES {
        let line = dependencies.lines().filter_map(|line| line.split_once(':'));
        let Some((file, needs)) = line.into_iter().find(|(file, _)| module_name(file) == wanted) else { continue };
        for file in needs.split_whitespace().rev().chain([file]) {
            if known.insert(file.to_owned()) {
                order.push(file.to_owned());
            }
        }
    }
    order
}

/// `kernel/fs/9p/9p.ko.xz` is `9p`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

/// A cpio archive in the format "newc" (cpio(5)), which the kernel unpacks.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, mode: u32, bytes: &[u8]) {
        self.entry(name, 0o100_000 | mode, bytes);
    }

    fn symlink(&mut self, name: &str, target: &str) {
        self.entry(name, 0o120_777, target.as_bytes());
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) {
        self.inode += 1;
        // Inode, mode, owner, group, links, time, size, four device numbers, length of the name, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().div_ceil(4) * 4, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_behind_what_they_need() {
        let dependencies = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n\
                            kernel/fs/netfs/netfs.ko.xz:\n\
                            kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/drivers/virtio/virtio.ko.xz\n";
        let order: Vec<String> = load_order(dependencies).iter().map(|file| module_name(file)).collect();
        assert_eq!(order, ["virtio", "9pnet", "9pnet_virtio", "netfs", "9p"]);
    }

    #[test]
    fn every_part_of_the_archive_starts_at_a_multiple_of_four() {
        let mut archive = Archive::default();
        archive.file("odd", 0o644, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[110..114], b"odd\0");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}

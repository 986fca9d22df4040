//! Debian's kernel, fetched and unpacked, never installed.
//!
//! It comes from the release's backports, else from the release itself, by apt with lists of its own: the
//! machine's sources and lists stay as they are.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::{initramfs, say};

/// The package that depends on the newest kernel.
const META_PACKAGE: &str = "linux-image-amd64";

/// A kernel that is ready to boot.
#[derive(Debug)]
pub(super) struct Kernel {
    /// The kernel itself, decompressed: that takes a guest longer than this machine.
    pub(super) image: PathBuf,
    /// Its initial file system.
    pub(super) initramfs: PathBuf,
    /// Its modules, as `/lib/modules` shall be.
    pub(super) modules: PathBuf,
}

/// The kernel of a cache directory, fetched if it is not there.
pub(super) fn prepare(cache: &Path) -> anyhow::Result<Kernel> {
    let lock = fs::File::create(cache.join("lock")).context("the cache's lock cannot be made")?;
    lock.lock().context("the cache cannot be locked")?;
    let directory = cache.join("kernel");
    if !directory.join("ready").exists() {
        let fetched = cache.join("fetching");
        if fetched.exists() {
            fs::remove_dir_all(&fetched)?;
        }
        fs::create_dir_all(&fetched)?;
        fetch(&fetched).context("Debian's kernel could not be fetched")?;
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::rename(&fetched, &directory)?;
    }
    let modules = directory.join("tree/lib/modules");
    let version = only_entry(&modules)?;
    let kernel = Kernel { image: directory.join("vmlinux"), initramfs: directory.join("initramfs"), modules };
    initramfs::write(&kernel.initramfs, &kernel.modules.join(version))?;
    Ok(kernel)
}

fn fetch(into: &Path) -> anyhow::Result<()> {
    say("fetching Debian's kernel package; it is kept, and not installed");
    let apt = Apt::new(&into.join("apt"))?;
    let package = apt.download(into)?;
    run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(into.join("tree")))?;
    let modules = into.join("tree/lib/modules");
    let version = only_entry(&modules)?;
    run(Command::new("depmod").env("PATH", path_with_sbin()).arg("-b").arg(into.join("tree")).arg(&version))?;
    let image = fs::read(into.join("tree/boot").join(format!("vmlinuz-{version}")))?;
    fs::write(into.join("vmlinux"), decompressed(&image)?)?;
    fs::remove_file(&package)?;
    fs::remove_dir_all(into.join("apt"))?;
    say(&format!("the guest's kernel is {version}"));
    Ok(fs::write(into.join("ready"), "")?)
}

/// apt with its own configuration, sources and lists.
struct Apt {
    directory: PathBuf,
    codename: String,
    mirror: String,
}

impl Apt {
    fn new(directory: &Path) -> anyhow::Result<Apt> {
        let parts = directory.join("parts");
        fs::create_dir_all(directory.join("lists/partial"))?;
        fs::create_dir_all(&parts)?;
        // A proxy may be configured there. Hooks, some of which delete archives, stay out of this.
        for entry in fs::read_dir("/etc/apt/apt.conf.d").into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            if !text.contains("Invoke") {
                fs::write(parts.join(entry.file_name()), text)?;
            }
        }
        let sources = directory.join("sources.list");
        fs::write(
            directory.join("apt.conf"),
            format!(
                "Dir::Etc::Parts \"{}\";\nDir::Etc::SourceList \"{}\";\nDir::Etc::SourceParts \"-\";\n\
                 Dir::State::Lists \"{}\";\nDir::Cache::pkgcache \"\";\nDir::Cache::srcpkgcache \"\";\n\
                 APT::Sandbox::User \"root\";\nAcquire::Retries \"3\";\n",
                parts.display(),
                sources.display(),
                directory.join("lists").display(),
            ),
        )?;
        let release = fs::read_to_string("/etc/os-release").context("this machine does not say what it is")?;
        let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
        let codename = codename.context("this machine is no release of Debian")?.trim_matches('"').to_owned();
        let known = output(
            Command::new("apt-get")
                .args(["indextargets", "--format", "$(REPO_URI)"])
                .arg(format!("Codename: {codename}")),
        )?;
        let mirror = known.lines().next().with_context(|| format!("apt has no source for {codename}"))?.to_owned();
        Ok(Apt { directory: directory.to_owned(), codename, mirror })
    }

    /// Downloads the newest kernel's package and returns its path.
    fn download(&self, into: &Path) -> anyhow::Result<PathBuf> {
        let mut last = None;
        for suite in [format!("{}-backports", self.codename), self.codename.clone()] {
            match self.download_from(&suite, into) {
                Ok(path) => return Ok(path),
                Err(error) => last = Some(error.context(format!("suite {suite}"))),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("there is no suite to ask")))
    }

    fn download_from(&self, suite: &str, into: &Path) -> anyhow::Result<PathBuf> {
        let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
        fs::write(
            self.directory.join("sources.list"),
            format!("deb [signed-by={key}] {} {suite} main\n", self.mirror),
        )?;
        run(self.command("apt-get").args(["-qq", "update"]))?;
        let depends = output(self.command("apt-cache").args(["depends", META_PACKAGE]))?;
        let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        let package = package.with_context(|| format!("{META_PACKAGE} is not there"))?;
        run(self.command("apt-get").args(["-qq", "download", package]).current_dir(into))?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|it| it == "deb");
        let found = fs::read_dir(into)?.flatten().map(|entry| entry.path()).find(is_package);
        found.with_context(|| format!("{package} was not downloaded"))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf"));
        command
    }
}

/// The kernel inside a bzImage (the kernel's `Documentation/arch/x86/boot.rst`, "payload_offset").
fn decompressed(image: &[u8]) -> anyhow::Result<Vec<u8>> {
    let number = |offset: usize| -> anyhow::Result<usize> {
        let bytes = image.get(offset..offset + 4).and_then(|it| it.first_chunk()).copied();
        Ok(u32::from_le_bytes(bytes.context("the kernel's image is too short")?).try_into()?)
    };
    let setup_sectors = usize::from(image.get(0x1f1).copied().context("the kernel's image is too short")?);
    let start = (setup_sectors + 1) * 512 + number(0x248)?;
    // The last four bytes are the length of what comes out.
    let end = start + number(0x24c)?.saturating_sub(4);
    let payload = image.get(start..end).context("the kernel's image ends before its payload")?;
    match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", payload),
        [0xfd, b'7', b'z', b'X', ..] => filter("xz", payload),
        // QEMU boots a compressed one too, more slowly.
        _ => Ok(image.to_vec()),
    }
}

/// What a decompressor makes of bytes.
pub(super) fn filter(program: &str, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("-dcq")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("no decompressor")?;
    let mut input = child.stdin.take().context("the decompressor has no input")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(bytes));
        child.wait_with_output()
    })?;
    if !output.status.success() {
        bail!("{program} failed: {}", output.status);
    }
    Ok(output.stdout)
}

/// The name of the only thing in a directory.
fn only_entry(directory: &Path) -> anyhow::Result<String> {
    let entry = fs::read_dir(directory).with_context(|| format!("{} is missing", directory.display()))?.next();
    let name = entry.with_context(|| format!("{} is empty", directory.display()))??.file_name();
    Ok(name.to_string_lossy().into_owned())
}

fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    output(command).map(drop)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?} could not be started"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

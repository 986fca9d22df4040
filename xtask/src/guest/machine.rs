//! QEMU: one run of one command.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::kernel::Kernel;
use super::{Options, say};

/// The guest's second stage.
const START: &str = include_str!("start.sh");

/// How often the guest's end is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How long a guest with KVM may take until its first process runs: it takes half a second. Some virtual machines
/// offer a KVM that stops at the first instruction which it does not know.
const KVM_START_MAX: Duration = Duration::from_secs(15);

/// How much of the guest's console is shown when it fails, in lines.
const CONSOLE_LINES_MAX: usize = 30;

/// How instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accelerator {
    Kvm,
    /// QEMU's own translation: everywhere, and ten times slower.
    Tcg,
}

/// A directory that machine and guest share, gone at the end of the run.
struct Control {
    path: PathBuf,
}

impl Control {
    fn make(cache: &Path) -> anyhow::Result<Control> {
        let runs = cache.join("runs");
        fs::create_dir_all(&runs)?;
        // Those of runs that were killed.
        for entry in fs::read_dir(&runs)?.flatten() {
            if !Path::new("/proc").join(entry.file_name()).exists() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let path = runs.join(std::process::id().to_string());
        fs::create_dir_all(&path)?;
        Ok(Control { path })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.file(name)).unwrap_or_default()).into_owned()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Runs the command. Returns its exit status, or nothing if the time was up.
pub(super) fn run(cache: &Path, kernel: &Kernel, options: &Options) -> anyhow::Result<Option<u8>> {
    let control = Control::make(cache)?;
    fs::write(control.file("start"), START)?;
    fs::write(control.file("command"), script(&options.command)?)?;
    fs::write(control.file("modules"), kernel.modules.to_string_lossy().as_bytes())?;
    let has_kvm = has_kvm();
    let mut in_time = true;
    if has_kvm {
        in_time = boot(Accelerator::Kvm, &control, kernel, options)?;
    }
    if !control.file("started").exists() {
        if has_kvm {
            say("KVM does not work here; trying without");
        }
        in_time = boot(Accelerator::Tcg, &control, kernel, options)?;
    }
    match control.read("status").trim().parse() {
        Ok(status) => Ok(Some(status)),
        Err(_) if !in_time => Ok(None),
        Err(_) => {
            let console = control.read("console");
            let lines: Vec<&str> = console.lines().collect();
            let end = &lines[lines.len().saturating_sub(CONSOLE_LINES_MAX)..];
            bail!("the guest failed\n{}{}", control.read("qemu"), end.join("\n"))
        }
    }
}

/// Whether the guest ended before the time was up.
fn boot(accelerator: Accelerator, control: &Control, kernel: &Kernel, options: &Options) -> anyhow::Result<bool> {
    fs::write(control.file("console"), "")?;
    let log = fs::File::create(control.file("qemu"))?;
    // The guest's output goes where ours goes: QEMU takes descriptors above 2. It ends when we end, however.
    let mut child = Command::new("sh")
        .args(["-c", r#"log=$1; shift; exec setpriv --pdeathsig KILL "$@" 8>&1 9>&2 >"$log" 2>&1"#, "sh"])
        .arg(control.file("qemu"))
        .args(arguments(accelerator, control, kernel, options))
        .stdin(Stdio::null())
        .spawn()
        .context("QEMU could not be started")?;
    drop(log);
    let mut console = Console { shown: 0 };
    let begin = Instant::now();
    loop {
        if options.verbose {
            console.show(&control.read("console"));
        }
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        let passed = begin.elapsed();
        let is_stuck = accelerator == Accelerator::Kvm && passed >= KVM_START_MAX && !control.file("started").exists();
        if passed >= options.timeout || is_stuck {
            stop(&mut child);
            return Ok(false);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Whether KVM is there, on a processor that has what KVM needs.
fn has_kvm() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let is_capable = cpuinfo.split_whitespace().any(|word| word == "vmx" || word == "svm");
    is_capable && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

fn stop(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// The kernel's messages, passed on as they come.
struct Console {
    shown: usize,
}

impl Console {
    fn show(&mut self, text: &str) {
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        let new = text.get(self.shown..complete).unwrap_or_default();
        new.lines().for_each(|line| say(line.trim_end()));
        self.shown = self.shown.max(complete);
    }
}

fn arguments(accelerator: Accelerator, control: &Control, kernel: &Kernel, options: &Options) -> Vec<String> {
    let mut list: Vec<String> = vec!["qemu-system-x86_64".into()];
    let mut add = |option: &str, value: String| list.extend([option.to_owned(), value]);
    let quiet = if options.verbose { "ignore_loglevel" } else { "quiet" };
    let mut kernel_arguments = format!("console=ttyS0 {quiet} panic=-1 reboot=t nokaslr mitigations=off");
    match accelerator {
        Accelerator::Kvm => {
            add("-accel", "kvm".into());
            add("-cpu", "host".into());
        }
        Accelerator::Tcg => {
            add("-accel", "tcg,thread=multi,tb-size=512".into());
            add("-cpu", "max,-la57".into());
            // A translated guest cannot measure its clock's rate against a busy machine's: it is told.
            if let Some(khz) = clock_khz() {
                let _ = write!(kernel_arguments, " tsc_early_khz={khz} tsc=nowatchdog");
            }
        }
    }
    add("-M", "microvm".into());
    add("-smp", options.cpus.to_string());
    add("-m", options.memory_mib.to_string());
    add("-display", "none".into());
    add("-kernel", kernel.image.display().to_string());
    add("-initrd", kernel.initramfs.display().to_string());
    add("-append", kernel_arguments);
    add("-serial", format!("file:{}", control.file("console").display()));
    add("-device", "virtio-serial-device".into());
    for (fd, stream) in [(8, "stdout"), (9, "stderr")] {
        add("-add-fd", format!("fd={fd},set={fd}"));
        add("-chardev", format!("file,id={stream},path=/dev/fdset/{fd},append=on"));
        add("-device", format!("virtserialport,chardev={stream},name={stream}"));
    }
    let shares = [("root", "/".to_owned(), ",readonly=on,multidevs=remap")];
    let shares = shares.into_iter().chain([("control", control.path.display().to_string(), "")]);
    for (tag, path, more) in shares {
        add("-fsdev", format!("local,id={tag},path={path},security_model=none{more}"));
        add("-device", format!("virtio-9p-device,fsdev={tag},mount_tag={tag}"));
    }
    list.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    list
}

/// The rate of the processor's time stamp counter, as Linux shows it: bogomips is twice the rate in MHz.
fn clock_khz() -> Option<u64> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("bogomips"))?;
    let megahertz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a clock's rate fits")]
    Some((megahertz * 500.0) as u64)
}

/// The command as a script for a shell: our environment, our directory.
fn script(command: &[String]) -> anyhow::Result<String> {
    let mut text = String::new();
    let is_name = |name: &str| {
        !name.starts_with(|it: char| it.is_ascii_digit())
            && !name.is_empty()
            && name.bytes().all(|it| it == b'_' || it.is_ascii_alphanumeric())
    };
    for (name, value) in std::env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        if is_name(name) {
            let _ = writeln!(text, "export {name}={}", quoted(value));
        }
    }
    let directory = std::env::current_dir().context("the current directory is gone")?;
    let _ = write!(text, "cd {} || exit\nexec", quoted(&directory.to_string_lossy()));
    for word in command {
        let _ = write!(text, " {}", quoted(word));
    }
    Ok(text + "\n")
}

/// A word that a shell reads as it is.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_every_word_as_it_is() {
        let words = ["a b", "it's", "$HOME `x` \\", "*", "\n", ""];
        for word in words {
            let output = Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]).output().unwrap();
            assert_eq!(output.stdout, word.as_bytes());
        }
    }
}

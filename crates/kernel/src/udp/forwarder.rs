//! The running tunnel: a device, sockets, and two threads for each queue.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use portolan_net::Family;
use portolan_program::udp::Tunnel;

use super::answer::Answerer;
use super::counters::{Counters, Tally, add_up};
use super::inward::Inward;
use super::outward::Outward;
use super::socket::Socket;
use super::{table, tun};
use crate::error::KernelError;

/// Queues of the device, and pairs of threads: beyond that the underlay is the bottleneck.
const QUEUES_MAX: usize = 8;

/// Why a thread ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It was told to.
    Stopped,
    /// The device is gone.
    Lost(Errno),
}

/// What wakes all threads up at the end.
#[derive(Debug)]
pub(super) struct Stop(EventFd);

impl Stop {
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What all threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) table: Arc<table::Shared>,
    pub(super) stop: Stop,
    is_stopped: AtomicBool,
    divides: AtomicBool,
    mtu: AtomicU32,
    begin: Instant,
    lost: Mutex<Option<Errno>>,
}

impl Shared {
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.begin.elapsed().as_millis() as u64
    }

    pub(super) fn mtu(&self) -> u32 {
        self.mtu.load(Ordering::Relaxed)
    }

    /// Whether the underlay takes several datagrams in one message.
    pub(super) fn divides(&self) -> bool {
        self.divides.load(Ordering::Relaxed)
    }

    pub(super) fn stop_dividing(&self) {
        self.divides.store(false, Ordering::Relaxed);
    }

    fn end(&self, end: End) {
        if let End::Lost(errno) = end {
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(errno);
        }
        self.is_stopped.store(true, Ordering::Relaxed);
        // It fails only when it was written to 2^64 times.
        let _ = self.stop.0.write(1);
    }
}

/// What one pair of threads has: a queue of the device, and a socket for each family of the underlay.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) queue: tun::Queue,
    v4: Option<(IpAddr, Socket)>,
    v6: Option<(IpAddr, Socket)>,
}

impl Ends {
    /// The socket of a family, and the address that it is on.
    pub(super) fn socket(&self, is_v6: bool) -> Option<(IpAddr, &Socket)> {
        let socket = if is_v6 { &self.v6 } else { &self.v4 };
        socket.as_ref().map(|(address, socket)| (*address, socket))
    }
}

/// A running tunnel.
#[derive(Debug)]
pub(super) struct Forwarder {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    outward: Vec<Arc<Tally>>,
    inward: Vec<Arc<Tally>>,
}

impl Forwarder {
    /// Opens the device and the sockets in the calling thread's namespace, and starts the threads.
    pub(super) fn start(tunnel: &Tunnel, table: Arc<table::Shared>) -> Result<Forwarder, KernelError> {
        let address = |family| tunnel.local(family).map(|address| SocketAddr::new(address, tunnel.port.get()));
        let [v4, v6] = Family::ALL.map(address);
        for local in [v4, v6].into_iter().flatten() {
            Socket::check_free(local)?;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let device = tun::open(&tunnel.device, cores.min(QUEUES_MAX))?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| KernelError::system("make an eventfd", errno))?;
        let shared = Arc::new(Shared {
            table,
            stop: Stop(stop),
            is_stopped: AtomicBool::new(false),
            divides: AtomicBool::new(true),
            mtu: AtomicU32::new(tunnel.mtu),
            begin: Instant::now(),
            lost: Mutex::new(None),
        });
        let mut forwarder = Forwarder { shared, threads: Vec::new(), outward: Vec::new(), inward: Vec::new() };
        let open = |local: Option<SocketAddr>| {
            local.map(|local| Socket::open(local).map(|socket| (local.ip(), socket))).transpose()
        };
        for (index, queue) in device.queues.into_iter().enumerate() {
            let ends = Arc::new(Ends { queue, v4: open(v4)?, v6: open(v6)? });
            forwarder.start_pair(index, &ends, device.divides_udp)?;
        }
        Ok(forwarder)
    }

    fn start_pair(&mut self, index: usize, ends: &Arc<Ends>, divides_udp: bool) -> Result<(), KernelError> {
        let (outward, inward) = (Arc::new(Tally::default()), Arc::new(Tally::default()));
        let out = Outward::new(self.shared.clone(), ends.clone(), outward.clone(), Answerer::open()?);
        let into = Inward::new(self.shared.clone(), ends.clone(), inward.clone(), divides_udp);
        self.outward.push(outward);
        self.inward.push(inward);
        self.spawn(format!("udp-out-{index}"), || out.run())?;
        self.spawn(format!("udp-in-{index}"), || into.run())
    }

    fn spawn(&mut self, name: String, work: impl FnOnce() -> End + Send + 'static) -> Result<(), KernelError> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let end = work();
            shared.end(end);
        });
        self.threads.push(thread.map_err(|error| KernelError::file("start a thread of the udp fabric", &error))?);
        Ok(())
    }

    /// Why it no longer forwards, if it does not.
    pub(super) fn lost(&self) -> Option<Errno> {
        let lost = *self.shared.lost.lock().unwrap_or_else(PoisonError::into_inner);
        // A thread that panicked lost the device too, as far as anyone can see.
        lost.or_else(|| self.threads.iter().any(JoinHandle::is_finished).then_some(Errno::EIO))
    }

    pub(super) fn set_mtu(&self, mtu: u32) {
        self.shared.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Adds what was counted.
    pub(super) fn count(&self, total: &mut Counters) {
        add_up(self.outward.iter().map(AsRef::as_ref), self.inward.iter().map(AsRef::as_ref), total);
    }

    /// Milliseconds since it started: the clock of what is known of paths.
    pub(super) fn now_ms(&self) -> u64 {
        self.shared.now_ms()
    }
}

impl Drop for Forwarder {
    /// Stops the threads and waits for them: none waits longer than for one call.
    fn drop(&mut self) {
        self.shared.end(End::Stopped);
        for thread in self.threads.drain(..) {
            // A panic was reported where it happened.
            let _ = thread.join();
        }
    }
}

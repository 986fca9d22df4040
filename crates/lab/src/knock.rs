//! Connects to many addresses until each takes a connection: how `lab up --wait` knows that Services
//! answer from a node.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// How long one attempt may take. A SYN that is dropped is sent again after a second only.
const ATTEMPT_TIME_MAX: Duration = Duration::from_millis(250);

/// The pause before an address that refused is tried again.
const PERIOD: Duration = Duration::from_millis(20);

/// Returns the addresses that took no connection within the time.
pub fn knock(addresses: &[SocketAddr], time: Duration) -> Vec<SocketAddr> {
    let until = Instant::now() + time;
    let mut left = addresses.to_vec();
    loop {
        left.retain(|address| TcpStream::connect_timeout(address, ATTEMPT_TIME_MAX).is_err());
        if left.is_empty() || Instant::now() > until {
            return left;
        }
        std::thread::sleep(PERIOD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn only_those_that_answer_are_taken_off() {
        let open = TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(knock(&[open.local_addr().unwrap(), closed], Duration::ZERO), [closed]);
    }
}

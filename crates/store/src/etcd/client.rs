//! Requests to whichever member answers: connections, fail-over, retries, tokens.
//!
//! A member that cannot be reached is left for the next. What can be asked twice (reads, keep-alive,
//! the opening of a watch) is, until the request's time is over. A write is sent again only when it
//! certainly was not sent, or refused before it was proposed; otherwise the caller is told that the
//! outcome is not known. That is also what etcd's own clients do.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use futures::stream;
use http::uri::PathAndQuery;
use prost::Message;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, ConnectError, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::config::{EtcdConfig, EtcdEndpoint, refused};
use super::messages::{AuthenticateRequest, AuthenticateResponse};
use crate::error::StoreError;
use crate::limits::{
    ETCD_CONNECT_TIMEOUT, ETCD_KEEP_ALIVE, ETCD_RESPONSE_BYTES_MAX, ETCD_RETRIES_MAX, ETCD_RETRY_PAUSE_MAX,
    ETCD_RETRY_PAUSE_MIN, ETCD_TOKEN_RENEWALS_MAX,
};

/// A procedure of etcd's API.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method {
    path: &'static str,
    /// Whether a second call does no harm when the first one took effect.
    repeatable: bool,
}

impl Method {
    pub(super) const RANGE: Self = Self { path: "/etcdserverpb.KV/Range", repeatable: true };
    pub(super) const TXN: Self = Self { path: "/etcdserverpb.KV/Txn", repeatable: false };
    /// A transaction that only reads.
    pub(super) const READ_TXN: Self = Self { path: "/etcdserverpb.KV/Txn", repeatable: true };
    pub(super) const COMPACT: Self = Self { path: "/etcdserverpb.KV/Compact", repeatable: false };
    pub(super) const WATCH: Self = Self { path: "/etcdserverpb.Watch/Watch", repeatable: true };
    /// With an id of the caller's choice, which a second call would find taken.
    pub(super) const LEASE_GRANT: Self = Self { path: "/etcdserverpb.Lease/LeaseGrant", repeatable: false };
    /// With an id of etcd's choice: a lease that nobody knows of ends by itself.
    pub(super) const LEASE_GRANT_ANY: Self = Self { path: "/etcdserverpb.Lease/LeaseGrant", repeatable: true };
    pub(super) const LEASE_REVOKE: Self = Self { path: "/etcdserverpb.Lease/LeaseRevoke", repeatable: true };
    pub(super) const LEASE_KEEP_ALIVE: Self = Self { path: "/etcdserverpb.Lease/LeaseKeepAlive", repeatable: true };
    pub(super) const LEASE_TIME_TO_LIVE: Self = Self { path: "/etcdserverpb.Lease/LeaseTimeToLive", repeatable: true };
    const AUTHENTICATE: Self = Self { path: "/etcdserverpb.Auth/Authenticate", repeatable: true };
}

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// etcd said no. `repeated`: an earlier try may have taken effect.
    Refused { status: Status, repeated: bool },
    /// What it is says all.
    Other(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Other(error)
    }
}

/// A stream that is open: requests are sent as long as it lives.
pub(super) struct Opened<Q, A> {
    /// Held, so that the server does not take the requests for ended.
    pub(super) _requests: mpsc::Sender<Q>,
    pub(super) answers: Streaming<A>,
    pub(super) first: A,
}

/// What shows etcd who asks.
type Token = MetadataValue<Ascii>;

struct Member {
    endpoint: EtcdEndpoint,
    channel: Channel,
}

/// The connections to etcd's members.
pub(super) struct Client {
    members: Vec<Member>,
    /// The member that is asked first.
    current: AtomicUsize,
    config: EtcdConfig,
    token: RwLock<Option<Token>>,
    /// Held while a token is fetched, so that one is fetched for all who wait.
    renewing: Mutex<()>,
}

impl Client {
    /// Prepares the connections; they are made when they are needed.
    pub(super) fn new(config: EtcdConfig) -> Result<Self, StoreError> {
        let tls = tls_config(&config)?;
        let members = config.endpoints.iter().map(|endpoint| {
            let failed = |error: tonic::transport::Error| refused(format!("{endpoint}: {}", with_sources(&error)));
            let mut builder = Endpoint::from_shared(endpoint.to_string())
                .map_err(failed)?
                .connect_timeout(ETCD_CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(ETCD_KEEP_ALIVE)
                .keep_alive_timeout(ETCD_KEEP_ALIVE)
                // etcd takes pings of a connection without calls for abuse, and closes it.
                .keep_alive_while_idle(false);
            if endpoint.is_tls {
                builder = builder.tls_config(tls.clone()).map_err(failed)?;
            }
            Ok(Member { endpoint: endpoint.clone(), channel: builder.connect_lazy() })
        });
        let members = members.collect::<Result<Vec<_>, StoreError>>()?;
        if members.is_empty() {
            return Err(refused("there is no endpoint".to_owned()));
        }
        let (current, token) = (AtomicUsize::new(0), RwLock::new(None));
        Ok(Self { members, current, config, token, renewing: Mutex::default() })
    }

    /// Asks once, and gets one answer.
    pub(super) async fn call<Q, A>(&self, method: Method, request: Q) -> Result<A, Failure>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.persist(method, |channel, token| unary(channel, method, request.clone(), token)).await
    }

    /// Opens a stream with a first request, and waits for the first answer.
    pub(super) async fn open<Q, A>(&self, method: Method, request: Q) -> Result<Opened<Q, A>, Failure>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.persist(method, |channel, token| streaming(channel, method, request.clone(), token)).await
    }

    /// Forgets the token, when etcd says in a roundabout way that it does not hold.
    /// `false` when there is none that could be renewed.
    pub(super) fn forget_token(&self) -> bool {
        self.config.credentials.is_some() && self.token.write().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }

    /// Tries members until one answers or the time is over.
    async fn persist<A, F>(&self, method: Method, attempt: impl Fn(Channel, Option<Token>) -> F) -> Result<A, Failure>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let mut effort = Effort::new(self, method);
        loop {
            let index = self.current.load(Ordering::Relaxed) % self.members.len();
            let member = &self.members[index];
            let token = match effort.bounded(self.token(member)).await {
                Ok(token) => token,
                // Nothing but the login was sent.
                Err(status) => {
                    effort.failed(index, &status, judge(&status, true)).await?;
                    continue;
                }
            };
            match effort.bounded(attempt(member.channel.clone(), token.clone())).await {
                Ok(answer) => return Ok(answer),
                Err(status) => {
                    let verdict = judge(&status, method.repeatable);
                    if matches!(verdict, Verdict::Renew) {
                        self.drop_token(token.as_ref());
                    }
                    effort.failed(index, &status, verdict).await?;
                }
            }
        }
    }

    /// The token for requests; fetched when there is none.
    async fn token(&self, member: &Member) -> Result<Option<Token>, Status> {
        let Some(credentials) = &self.config.credentials else { return Ok(None) };
        let known = || self.token.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(token) = known() {
            return Ok(Some(token));
        }
        let _renewing = self.renewing.lock().await;
        if let Some(token) = known() {
            return Ok(Some(token));
        }
        let request = AuthenticateRequest { name: credentials.user.clone(), password: credentials.password.clone() };
        let answer: AuthenticateResponse =
            match unary(member.channel.clone(), Method::AUTHENTICATE, request, None).await {
                // Whoever may do everything without a user may go on.
                Err(status) if status.message() == "etcdserver: authentication is not enabled" => return Ok(None),
                answer => answer?,
            };
        let token = MetadataValue::try_from(answer.token.as_str());
        let token = token.map_err(|_| Status::internal("the token cannot be sent in a header"))?;
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
        Ok(Some(token))
    }

    /// Forgets a token that was refused, unless another took its place.
    fn drop_token(&self, refused: Option<&Token>) {
        let mut token = self.token.write().unwrap_or_else(PoisonError::into_inner);
        if token.as_ref() == refused {
            *token = None;
        }
    }

    /// Goes on to the next member, unless somebody did already.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// What is known of the tries of one call.
struct Effort<'client> {
    client: &'client Client,
    method: Method,
    deadline: Instant,
    /// The longest that one member may take.
    share: Duration,
    tries: usize,
    renewals: usize,
    /// An earlier try may have taken effect.
    repeated: bool,
    /// The last reason of each member.
    reasons: Vec<Option<String>>,
}

impl<'client> Effort<'client> {
    fn new(client: &'client Client, method: Method) -> Self {
        let time = client.config.request_timeout;
        // A member that is silent must leave time for the others.
        let shares = if method.repeatable { client.members.len().clamp(1, 3) } else { 1 };
        Self {
            client,
            method,
            deadline: Instant::now() + time,
            share: time / u32::try_from(shares).unwrap_or(1),
            tries: 0,
            renewals: 0,
            repeated: false,
            reasons: vec![None; client.members.len()],
        }
    }

    async fn bounded<T>(&self, attempt: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let until = self.deadline.min(Instant::now() + self.share);
        match tokio::time::timeout_at(until, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Status::deadline_exceeded(format!("no answer within {:?}", self.share))),
        }
    }

    /// Takes note of a failure; returns when it makes sense to try again.
    async fn failed(&mut self, index: usize, status: &Status, verdict: Verdict) -> Result<(), Failure> {
        let said = explain(status);
        match verdict {
            Verdict::Refused => {
                return Err(Failure::Refused { status: status.clone(), repeated: self.repeated });
            }
            Verdict::Unknown => {
                self.client.leave(index);
                let reason = format!("{}: {said}", self.client.members[index].endpoint);
                return Err(StoreError::OutcomeUnknown { reason }.into());
            }
            Verdict::Renew => {
                self.renewals += 1;
                if self.renewals > ETCD_TOKEN_RENEWALS_MAX {
                    return Err(StoreError::Denied { reason: said }.into());
                }
                return Ok(());
            }
            Verdict::Elsewhere { may_have_run } => self.repeated |= may_have_run,
        }
        self.reasons[index] = Some(said);
        self.client.leave(index);
        self.tries += 1;
        let rounds = self.tries / self.reasons.len();
        let is_round = self.tries.is_multiple_of(self.reasons.len());
        let pause = if is_round { pause_after(rounds) } else { Duration::ZERO };
        if self.tries >= ETCD_RETRIES_MAX || Instant::now() + pause >= self.deadline {
            return Err(self.give_up().into());
        }
        tracing::debug!(path = self.method.path, tries = self.tries, "a member of etcd did not answer");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn give_up(&self) -> StoreError {
        let mut reason = String::new();
        for (member, said) in self.client.members.iter().zip(&self.reasons) {
            let separator = if reason.is_empty() { "" } else { "; " };
            let said = said.as_deref().unwrap_or("not tried");
            // Writing to a String cannot fail.
            let _ = write!(reason, "{separator}{}: {said}", member.endpoint);
        }
        StoreError::Unreachable { reason }
    }
}

/// The pause before another round over all members.
pub(super) fn pause_after(rounds: usize) -> Duration {
    let factor = 1u32 << rounds.saturating_sub(1).min(16);
    ETCD_RETRY_PAUSE_MIN.saturating_mul(factor).min(ETCD_RETRY_PAUSE_MAX)
}

/// What a failure means for the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// etcd answered, and the answer is no.
    Refused,
    /// Another try is safe.
    Elsewhere { may_have_run: bool },
    /// Another try is safe with a new token.
    Renew,
    /// It may or may not have taken effect.
    Unknown,
}

/// What etcd says before it proposes anything to its members.
const NEVER_PROPOSED: [&str; 3] =
    ["etcdserver: too many requests", "etcdserver: not capable", "etcdserver: rpc not supported for learner"];

fn judge(status: &Status, repeatable: bool) -> Verdict {
    let message = status.message();
    if was_never_sent(status) || NEVER_PROPOSED.contains(&message) {
        return Verdict::Elsewhere { may_have_run: false };
    }
    if message == "etcdserver: invalid auth token" || message == "etcdserver: revision of auth store is old" {
        return Verdict::Renew;
    }
    // What the transport says of itself carries its cause; what came over the wire does not.
    let is_answer = std::error::Error::source(status).is_none();
    let is_definite = match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => false,
        Code::Unknown | Code::Internal => is_answer && message.starts_with("etcdserver:"),
        // Also what the transport says when an answer is too large to be taken.
        Code::OutOfRange => message.starts_with("etcdserver:"),
        _ => true,
    };
    match (is_definite, repeatable) {
        (true, _) => Verdict::Refused,
        (false, true) => Verdict::Elsewhere { may_have_run: true },
        (false, false) => Verdict::Unknown,
    }
}

/// Whether there was no connection to send anything over.
fn was_never_sent(status: &Status) -> bool {
    let first: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    std::iter::successors(first, |error| error.source()).any(<dyn std::error::Error>::is::<ConnectError>)
}

/// What a status says, with its causes.
pub(super) fn explain(status: &Status) -> String {
    let causes = std::error::Error::source(status).map(with_sources).unwrap_or_default();
    match (status.message(), causes.as_str()) {
        ("", "") => status.code().description().to_owned(),
        ("", causes) => causes.to_owned(),
        (message, "") => message.to_owned(),
        // The causes begin with what the message says.
        (_, causes) => causes.to_owned(),
    }
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}

async fn grpc(channel: Channel) -> Result<Grpc<Channel>, Status> {
    let mut grpc = Grpc::new(channel).max_decoding_message_size(ETCD_RESPONSE_BYTES_MAX);
    grpc.ready().await.map_err(|error| Status::unavailable(with_sources(&error)))?;
    Ok(grpc)
}

async fn unary<Q, A>(channel: Channel, method: Method, request: Q, token: Option<Token>) -> Result<A, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let mut grpc = grpc(channel).await?;
    let codec = ProstCodec::<Q, A>::default();
    let request = with_token(Request::new(request), token);
    Ok(grpc.unary(request, PathAndQuery::from_static(method.path), codec).await?.into_inner())
}

async fn streaming<Q, A>(
    channel: Channel,
    method: Method,
    request: Q,
    token: Option<Token>,
) -> Result<Opened<Q, A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let (requests, mut waiting) = mpsc::channel(1);
    requests.try_send(request).map_err(|_| Status::internal("a new queue is full"))?;
    let outbound = Request::new(stream::poll_fn(move |context| waiting.poll_recv(context)));
    let mut outbound = with_token(outbound, token);
    // A member without a leader ends the stream then, and does not let it wait for nothing.
    outbound.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    let mut grpc = grpc(channel).await?;
    let codec = ProstCodec::<Q, A>::default();
    let mut answers = grpc.streaming(outbound, PathAndQuery::from_static(method.path), codec).await?.into_inner();
    let first = answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended at once"))?;
    Ok(Opened { _requests: requests, answers, first })
}

fn with_token<Q>(mut request: Request<Q>, token: Option<Token>) -> Request<Q> {
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    request
}

fn tls_config(config: &EtcdConfig) -> Result<ClientTlsConfig, StoreError> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|error| refused(format!("{} cannot be read: {error}", path.display())))
    };
    let mut tls = ClientTlsConfig::new();
    tls = match &config.tls.authority {
        Some(authority) => tls.ca_certificate(Certificate::from_pem(read(authority)?)),
        None => tls.with_native_roots(),
    };
    if let Some((certificate, key)) = &config.tls.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(tls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_sent_again_only_when_it_cannot_have_happened() {
        let lost = Verdict::Elsewhere { may_have_run: true };
        let unsent = Verdict::Elsewhere { may_have_run: false };
        let cases = [
            (Code::Unavailable, "etcdserver: request timed out", lost, Verdict::Unknown),
            (Code::Unavailable, "etcdserver: leader changed", lost, Verdict::Unknown),
            (Code::Unavailable, "connection reset", lost, Verdict::Unknown),
            (Code::DeadlineExceeded, "no answer within 5s", lost, Verdict::Unknown),
            (Code::OutOfRange, "decoded message length too large", lost, Verdict::Unknown),
            (Code::ResourceExhausted, "etcdserver: too many requests", unsent, unsent),
            (Code::Unavailable, "etcdserver: not capable", unsent, unsent),
            (Code::Unauthenticated, "etcdserver: invalid auth token", Verdict::Renew, Verdict::Renew),
            (
                Code::OutOfRange,
                "etcdserver: mvcc: required revision has been compacted",
                Verdict::Refused,
                Verdict::Refused,
            ),
            (Code::PermissionDenied, "etcdserver: permission denied", Verdict::Refused, Verdict::Refused),
        ];
        for (code, message, read, write) in cases {
            let status = Status::new(code, message);
            assert_eq!((judge(&status, true), judge(&status, false)), (read, write), "{message}");
        }
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        assert_eq!(pause_after(1), ETCD_RETRY_PAUSE_MIN);
        assert_eq!(pause_after(2), ETCD_RETRY_PAUSE_MIN * 2);
        assert_eq!(pause_after(1_000), ETCD_RETRY_PAUSE_MAX);
    }
}

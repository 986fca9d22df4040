//! The certificates and the token of the loopback listener, and the kubeconfig that carries them.
//!
//! They are made once and kept in the data directory, so that a kubeconfig that was copied stays
//! valid. The key of the authority signs one certificate and is then forgotten: nobody can sign
//! another.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::Config;
use crate::error::Error;

const AUTHORITY: &str = "ca.crt";
const CERTIFICATE: &str = "server.crt";
const KEY: &str = "server.key";
const TOKEN: &str = "token";

/// Names that a client may know the server by, besides its address.
const NAMES: [&str; 7] = [
    "localhost",
    "127.0.0.1",
    "::1",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];

/// What the loopback listener needs.
pub(crate) struct Credentials {
    pub(crate) tls: Arc<rustls::ServerConfig>,
    pub(crate) token: String,
    authority_pem: String,
}

/// Reads the credentials back, or makes them.
pub(crate) fn credentials(config: &Config) -> Result<Credentials, Error> {
    let directory = config.data_directory.as_path();
    let is_complete = [AUTHORITY, CERTIFICATE, KEY].iter().all(|name| directory.join(name).exists());
    if !is_complete {
        make_certificates(config)?;
    }
    let refused = |reason: String| Error::Certificates { path: directory.to_owned(), reason };
    let certificate = CertificateDer::from_pem_file(directory.join(CERTIFICATE))
        .map_err(|error| refused(format!("{CERTIFICATE}: {error}")))?;
    let key = PrivateKeyDer::from_pem_file(directory.join(KEY)).map_err(|error| refused(format!("{KEY}: {error}")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate], key))
        .map_err(|error| refused(error.to_string()))?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let authority_pem = read(&directory.join(AUTHORITY))?;
    Ok(Credentials { tls: Arc::new(tls), token: token(config)?, authority_pem })
}

fn make_certificates(config: &Config) -> Result<(), Error> {
    let directory = &config.data_directory;
    let made = (|| {
        let authority_key = KeyPair::generate()?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.distinguished_name.push(DnType::CommonName, "portolan-ca");
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let authority_certificate = authority.self_signed(&authority_key)?;
        let key = KeyPair::generate()?;
        let mut names: Vec<String> = NAMES.map(str::to_owned).to_vec();
        let own = config.loopback_address.to_string();
        if !names.contains(&own) {
            names.push(own);
        }
        let mut server = CertificateParams::new(names)?;
        server.distinguished_name.push(DnType::CommonName, "portolan-apiserver");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_params(&authority, &authority_key);
        let certificate = server.signed_by(&key, &issuer)?;
        Ok((authority_certificate.pem(), certificate.pem(), key.serialize_pem()))
    })();
    let (authority, certificate, key) =
        made.map_err(|error: rcgen::Error| Error::Certificates { path: directory.clone(), reason: error.to_string() })?;
    write_private(&directory.join(KEY), &key)?;
    write_private(&directory.join(CERTIFICATE), &certificate)?;
    write_private(&directory.join(AUTHORITY), &authority)
}

/// The token that was given, that was kept, or a new one.
fn token(config: &Config) -> Result<String, Error> {
    let path = config.data_directory.join(TOKEN);
    if let Some(token) = &config.token {
        return Ok(token.clone());
    }
    if path.exists() {
        let kept = read(&path)?.trim().to_owned();
        if !kept.is_empty() {
            return Ok(kept);
        }
    }
    let random = crate::api::random().map_err(|error| Error::Prepare(error.to_string()))?;
    let mut token = String::new();
    for byte in random {
        // Writing to a String cannot fail.
        let _ = write!(token, "{byte:02x}");
    }
    write_private(&path, &token)?;
    Ok(token)
}

impl Credentials {
    /// Writes the kubeconfig for the address that the server listens on.
    pub(crate) fn write_kubeconfig(&self, path: &Path, address: SocketAddr) -> Result<(), Error> {
        let authority = STANDARD.encode(&self.authority_pem);
        let token = serde_json::Value::from(self.token.as_str());
        let kubeconfig = format!(
            "apiVersion: v1\n\
             kind: Config\n\
             clusters:\n\
             - name: portolan\n\
             \x20 cluster:\n\
             \x20   server: https://{address}\n\
             \x20   certificate-authority-data: {authority}\n\
             users:\n\
             - name: portolan\n\
             \x20 user:\n\
             \x20   token: {token}\n\
             contexts:\n\
             - name: portolan\n\
             \x20 context:\n\
             \x20   cluster: portolan\n\
             \x20   user: portolan\n\
             \x20   namespace: default\n\
             current-context: portolan\n"
        );
        write_private(path, &kubeconfig)
    }
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { action: "read", path: path.to_owned(), source })
}

/// Writes a file that only its owner reads, whole or not at all.
fn write_private(path: &Path, content: &str) -> Result<(), Error> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    let staged = Path::new(&staged);
    let written = (|| {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(staged)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(staged, path)
    })();
    written.map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
}

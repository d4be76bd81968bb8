// SPDX-License-Identifier: MIT OR Apache-2.0

//! Sends the lines of standard input, a log for example, to a TLS server. Clones of the virtual machine
//! do not continue the same connection: each clone connects anew.
//!
//!     rustls ADDRESS:PORT NAME CA.pem
//!
//! The keys and the record numbers of a TLS connection, and the secrets for resumption, are in memory.
//! Two clones that continue with them encrypt different data with the same key and the same nonce.

use chacha20::ChaCha20Rng;
use rand_core::TryRng as _;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    crypto::{CryptoProvider, GetRandomFailed, SecureRandom, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use std::{
    env,
    error::Error,
    io::{self, Write as _},
    net::TcpStream,
    sync::{Arc, Mutex},
};
use vmgenid::{Cached, Guard, GuardedRng, WithoutCounter};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The random bytes that rustls itself draws, for hellos for example. AWS-LC draws the keys, from
/// its own generator, which detects restores by `/dev/sysgenid`.
#[derive(Debug)]
struct Random(Mutex<GuardedRng<ChaCha20Rng>>);

impl SecureRandom for Random {
    fn fill(&self, buf: &mut [u8]) -> std::result::Result<(), GetRandomFailed> {
        let mut rng = self.0.lock().map_err(|_| GetRandomFailed)?;
        rng.try_fill_bytes(buf).map_err(|_| GetRandomFailed)
    }
}

struct Connection {
    tls: ClientConnection,
    tcp: TcpStream,
}

fn connect(
    provider: &Arc<CryptoProvider>,
    roots: &RootCertStore,
    address: &str,
    name: &str,
) -> Result<Connection> {
    // A configuration remembers sessions, so a new connection has a new one.
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned())?;
    let mut tls = ClientConnection::new(Arc::new(config), name)?;
    let mut tcp = TcpStream::connect(address)?;
    tls.complete_io(&mut tcp)?;
    eprintln!("connected");
    Ok(Connection { tls, tcp })
}

fn main() -> Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [address, name, ca] = &arguments[..] else {
        return Err("usage: rustls ADDRESS:PORT NAME CA.pem".into());
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca)? {
        roots.add(certificate?)?;
    }
    let guard = Guard::open(WithoutCounter::Refuse)?;
    let random = Random(Mutex::new(GuardedRng::new(guard.clone())?));
    let provider = Arc::new(CryptoProvider {
        secure_random: Box::leak(Box::new(random)),
        ..aws_lc_rs::default_provider()
    });
    let mut connection = Cached::new(guard, || connect(&provider, &roots, address, name))?;

    for line in io::stdin().lines() {
        let line = line? + "\n";
        loop {
            let Connection { tls, tcp } = connection.get()?;
            tls.writer().write_all(line.as_bytes())?;
            let mut records = Vec::new();
            while tls.wants_write() {
                tls.write_tls(&mut records)?;
            }
            let mut tcp = tcp.try_clone()?;
            // After a restore, the next turn of the loop connects anew. If the restore comes after this
            // look, all clones send the same record, with the same content.
            if connection.is_unchanged() {
                tcp.write_all(&records)?;
                break;
            }
        }
    }
    Ok(())
}

//! What can be done with objects, whoever asks: HTTP clients or the controllers within.
//!
//! ```text
//!   read.rs        get, list with paging           watch.rs    changes as they happen
//!   write.rs       create, update                  patch.rs    the four kinds of patch, scale
//!   delete.rs      delete, in the end or at once   allocation.rs   who holds which address and port
//! ```
//!
//! An object is JSON under `/registry/GROUP/PLURAL/NAMESPACE/NAME`; its `resourceVersion` is the
//! store's revision and is not stored. Every write compares the revision that it read.

mod allocation;
mod delete;
mod patch;
mod read;
mod watch;
mod write;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portolan_store::{KeyRange, KeyValue, RangeRequest, Store, WatchRequest};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use self::allocation::Allocation;
use crate::config::Config;
use crate::fields::{at, set, text};
use crate::resources::{Resource, Resources, api_version};
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::ApiError;

pub(crate) use self::delete::{DeleteOptions, Deleted};
pub(crate) use self::patch::{PatchKind, ScaleRequest};
pub(crate) use self::read::{List, ListRequest};
pub(crate) use self::watch::{WatchEvent, WatchStart, Watching};
pub(crate) use self::write::{Part, WriteOptions, is_over};

/// How long to wait after the definitions of kinds could not be read.
const DEFINITIONS_PAUSE: Duration = Duration::from_secs(1);

/// The objects of a cluster.
pub(crate) struct Api {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) config: Config,
    resources: RwLock<Arc<Resources>>,
    /// Held from reading who has what to writing who gets what.
    allocation: Mutex<Allocation>,
}

/// An object, or where it would be.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) resource: Arc<Resource>,
    /// The version that the client speaks.
    pub(crate) version: String,
    /// Empty for a kind without namespaces.
    pub(crate) namespace: String,
    /// Empty where the name is yet to be generated.
    pub(crate) name: String,
}

impl Place {
    pub(crate) fn key(&self) -> String {
        self.resource.key(&self.namespace, &self.name)
    }

    /// Before the keys of what a place without a name stands for.
    fn prefix(&self) -> String {
        let namespace = Some(self.namespace.as_str()).filter(|namespace| !namespace.is_empty());
        self.resource.namespace_prefix(namespace)
    }

    /// The place of an object of a known kind.
    pub(crate) fn of(resource: &Arc<Resource>, object: &Value) -> Self {
        Self {
            resource: Arc::clone(resource),
            version: resource.versions.first().cloned().unwrap_or_default(),
            namespace: text(object, "metadata.namespace").to_owned(),
            name: text(object, "metadata.name").to_owned(),
        }
    }

    fn not_found(&self) -> ApiError {
        ApiError::not_found(&self.resource, &self.name)
    }

    /// The object of a stored version, as the client sees it.
    fn decode(&self, item: &KeyValue) -> Result<Value, ApiError> {
        decode(&self.resource, &self.version, item)
    }
}

/// Which objects of a kind are meant.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selection {
    pub(crate) labels: LabelSelector,
    pub(crate) fields: FieldSelector,
}

impl Selection {
    pub(crate) fn parse(labels: &str, fields: &str) -> Result<Self, ApiError> {
        Ok(Self { labels: LabelSelector::parse(labels)?, fields: FieldSelector::parse(fields)? })
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.labels.matches(at(object, "metadata.labels")) && self.fields.matches(object)
    }

    fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }
}

impl Api {
    pub(crate) async fn new(store: Arc<dyn Store>, config: Config) -> Result<Self, ApiError> {
        let api = Self { store, config, resources: RwLock::default(), allocation: Mutex::default() };
        api.load_definitions().await?;
        Ok(api)
    }

    /// The kinds that are served now.
    pub(crate) fn resources(&self) -> Arc<Resources> {
        Arc::clone(&self.resources.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Follows the definitions that other servers on the store write. Runs until it is dropped.
    pub(crate) async fn follow_definitions(&self) {
        loop {
            if let Err(error) = self.follow_definitions_once().await {
                tracing::warn!(%error, "definitions of kinds cannot be followed; it is tried again");
                tokio::time::sleep(DEFINITIONS_PAUSE).await;
            }
        }
    }

    async fn follow_definitions_once(&self) -> Result<(), ApiError> {
        let prefix = definitions(&Resources::new([]))?.prefix();
        let revision = self.load_definitions().await?;
        let mut watcher = self.store.watch(WatchRequest::new(KeyRange::prefix(prefix), revision + 1)).await?;
        while watcher.next().await.is_ok() {
            self.load_definitions().await?;
        }
        Ok(())
    }

    /// Reads the CustomResourceDefinitions anew; the answer is the revision that was read.
    pub(crate) async fn load_definitions(&self) -> Result<u64, ApiError> {
        let built_in = Resources::new([]);
        let definition = definitions(&built_in)?;
        let read = self.store.range(RangeRequest::new(KeyRange::prefix(definition.prefix()))).await?;
        let definitions =
            read.items.iter().map(|item| decode(definition, "v1", item)).collect::<Result<Vec<_>, _>>()?;
        let resources = Arc::new(Resources::new(&definitions));
        *self.resources.write().unwrap_or_else(PoisonError::into_inner) = resources;
        Ok(read.revision)
    }

    /// Makes the objects that every cluster has.
    pub(crate) async fn prepare(&self) -> Result<(), ApiError> {
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            match self.create_object(object).await {
                Ok(_) => {}
                Err(error) if error.reason == "AlreadyExists" => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Creates an object on the server's own behalf.
    pub(crate) async fn create_object(&self, object: Value) -> Result<Value, ApiError> {
        let place = self.place_of(&object)?;
        self.create(&Place { name: String::new(), ..place }, object, &WriteOptions::internal()).await
    }

    /// Where an object belongs, by its own words.
    pub(crate) fn place_of(&self, object: &Value) -> Result<Place, ApiError> {
        let resources = self.resources();
        let unknown = || {
            let (version, kind) = (text(object, "apiVersion"), text(object, "kind"));
            ApiError::bad_request(format!("no matches for kind {kind:?} in version {version:?}"))
        };
        Ok(Place::of(resources.of_object(object).ok_or_else(unknown)?, object))
    }
}

/// The kind of the definitions of kinds.
fn definitions(resources: &Resources) -> Result<&Arc<Resource>, ApiError> {
    let definition = resources.find("apiextensions.k8s.io", "v1", "customresourcedefinitions");
    definition.ok_or_else(|| ApiError::internal("definitions are not served"))
}

/// A stored version as JSON, with what is not stored.
pub(crate) fn decode(resource: &Resource, version: &str, item: &KeyValue) -> Result<Value, ApiError> {
    let mut object: Value = serde_json::from_slice(&item.value).map_err(|error| {
        let key = String::from_utf8_lossy(&item.key).into_owned();
        ApiError::internal(format!("the object stored at {key} does not parse: {error}"))
    })?;
    stamp(&mut object, item.mod_revision);
    if resource.is_custom {
        set(&mut object, "apiVersion", api_version(&resource.group, version).into());
    }
    Ok(object)
}

/// Sets the revision that a client sees.
fn stamp(object: &mut Value, revision: u64) {
    set(object, "metadata.resourceVersion", revision.to_string().into());
}

/// The form in which an object is stored.
fn encode(object: &Value) -> Vec<u8> {
    let mut stored = object.clone();
    crate::fields::remove(&mut stored, "metadata.resourceVersion");
    stored.to_string().into_bytes()
}

/// Seconds since 1970.
pub(crate) fn now_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Sixteen random bytes.
pub(crate) fn random() -> Result<[u8; 16], ApiError> {
    let mut bytes = [0; 16];
    let read =
        std::fs::File::open("/dev/urandom").and_then(|mut source| std::io::Read::read_exact(&mut source, &mut bytes));
    read.map_err(|error| ApiError::internal(format!("/dev/urandom cannot be read: {error}")))?;
    Ok(bytes)
}

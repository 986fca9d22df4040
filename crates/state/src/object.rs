//! The objects that the tables hold: only the fields that some intent reads.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_net::{MacAddress, NodeName, ObjectKey, Port, Protocol, Vni};
use serde::{Deserialize, Serialize};

pub use portolan_net::Family as IpVersion;

/// A namespace. DNS answers differ for names in one that exists and one that does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its name.
    pub name: Arc<str>,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `metadata.name`.
    pub name: NodeName,
    /// `status.addresses` of type InternalIP, in their order; the first of a family is the primary.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`: at most one prefix per family.
    pub pod_prefixes: Vec<IpNet>,
    /// What the node tells others about its tunnel; `None` until its agent has said so.
    pub tunnel: Option<NodeTunnel>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Whether load balancers are to stop sending to it: it is being deleted, or bears the taint
    /// `ToBeDeletedByClusterAutoscaler` (KEP-3836).
    pub leaving: bool,
}

impl Node {
    /// The first address of a family.
    pub fn address(&self, family: IpVersion) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| IpVersion::of(*address) == family)
    }

    /// The pod prefix of a family.
    pub fn pod_prefix(&self, family: IpVersion) -> Option<IpNet> {
        self.pod_prefixes.iter().copied().find(|prefix| IpVersion::of_prefix(prefix) == family)
    }
}

/// A node's end of the fabric, as Flannel publishes it in the node's annotations
/// (`flannel.alpha.coreos.com/…`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeTunnel {
    /// `backend-type`: `vxlan`, `host-gw`, ….
    pub backend: Arc<str>,
    /// `public-ip` and `public-ipv6`: where other nodes send to.
    pub public_addresses: Vec<IpAddr>,
    /// `VNI` of `backend-data`.
    pub vni: Option<Vni>,
    /// `VtepMAC` of `backend-data`: the hardware address of `flannel.<VNI>`.
    pub vtep_mac_v4: Option<MacAddress>,
    /// `VtepMAC` of `backend-v6-data`: the hardware address of `flannel-v6.<VNI>`.
    pub vtep_mac_v6: Option<MacAddress>,
}

/// Another node's subnet and how to reach it, where subnets are leased as Flannel does in etcd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The lease's name: `10.5.34.0-24`, with IPv6 `10.5.34.0-24&fd00:0:0:34::-64`.
    pub key: Arc<str>,
    /// At most one prefix per family.
    pub prefixes: Vec<IpNet>,
    /// The node's end of the fabric.
    pub tunnel: NodeTunnel,
    /// `PublicKey` of WireGuard's IPv4 device, or of the only one, in base64.
    pub public_key_v4: Option<Arc<str>>,
    /// `PublicKey` of WireGuard's IPv6 device, in base64.
    pub public_key_v6: Option<Arc<str>>,
    /// Whether it does not end.
    pub is_reservation: bool,
}

impl Subnet {
    /// The prefix of a family.
    pub fn prefix(&self, family: IpVersion) -> Option<IpNet> {
        self.prefixes.iter().copied().find(|prefix| IpVersion::of_prefix(prefix) == family)
    }
}

/// `spec.type` of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceType {
    /// Reachable inside the cluster at its cluster addresses.
    ClusterIp,
    /// Also at a port of every node.
    NodePort,
    /// Also at addresses of a load balancer.
    LoadBalancer,
    /// A name only: a CNAME to this one.
    ExternalName(Arc<str>),
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs`; empty for a headless Service and for ExternalName.
    pub cluster_addresses: Vec<IpAddr>,
    /// Whether `spec.clusterIP` is `None`.
    pub headless: bool,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// Who may come from where, and which endpoints answer.
    pub traffic: ServiceTraffic,
}

/// What a Service says of its traffic beyond addresses and ports. The default is what an API server fills in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceTraffic {
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.sessionAffinity: ClientIP`, with `sessionAffinityConfig.clientIP.timeoutSeconds`.
    pub affinity: Option<AffinityTimeout>,
    /// `spec.externalIPs`.
    pub external_addresses: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip`, without those of `ipMode: Proxy`.
    pub load_balancer_addresses: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`: who may connect to those addresses. Everyone where it is not given,
    /// nobody where nothing of it can be read.
    pub load_balancer_sources: Option<Vec<IpNet>>,
    /// `spec.healthCheckNodePort`.
    pub health_check_port: Option<Port>,
}

/// Which endpoints traffic may go to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Those of the whole cluster.
    #[default]
    Cluster,
    /// Those of the node that the traffic came to.
    Local,
}

/// How long a client is sent to the endpoint that it was sent to before, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AffinityTimeout(NonZeroU32);

impl AffinityTimeout {
    /// Three hours: what an API server fills in.
    pub const DEFAULT: AffinityTimeout = AffinityTimeout(NonZeroU32::new(10_800).unwrap());

    /// Kubernetes allows a day at most.
    pub const MAX: u32 = 86_400;

    /// A timeout of 1 to [`AffinityTimeout::MAX`] seconds.
    pub fn new(seconds: u32) -> Option<AffinityTimeout> {
        NonZeroU32::new(seconds).filter(|seconds| seconds.get() <= Self::MAX).map(AffinityTimeout)
    }

    /// In seconds.
    pub fn seconds(self) -> u32 {
        self.0.get()
    }
}

/// One entry of a Service's `spec.ports`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Its name; empty where there is only one port without a name.
    pub name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The port at the cluster address.
    pub port: Port,
    /// The port at every node.
    pub node_port: Option<Port>,
}

/// Part of a Service's endpoints: one `EndpointSlice` (discovery.k8s.io/v1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    /// Namespace and name of the slice.
    pub key: ObjectKey,
    /// The Service named by label `kubernetes.io/service-name`, in the slice's namespace.
    pub service: ObjectKey,
    /// `addressType`.
    pub family: IpVersion,
    /// `ports`; a port without a number stands for all ports and is left out.
    pub ports: Vec<EndpointPort>,
    /// `endpoints`, one per address that traffic may go to.
    pub endpoints: Vec<Endpoint>,
    /// Label `service.kubernetes.io/headless`: names only, nothing is sent to it by way of a proxy.
    pub headless: bool,
}

/// One entry of a slice's `ports`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointPort {
    /// The Service port's name.
    pub name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// The port at the endpoint.
    pub port: Port,
}

/// One endpoint: the first address of an entry, as `EndpointSlice` demands of its readers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Where traffic goes.
    pub address: IpAddr,
    /// `conditions.ready`; unset means true.
    pub ready: bool,
    /// `conditions.serving`; unset means the value of ready.
    pub serving: bool,
    /// `conditions.terminating`; unset means false.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<NodeName>,
    /// `hostname`: the endpoint's own name under a headless Service.
    pub hostname: Option<Arc<str>>,
    /// `hints`: whose traffic it is meant for.
    pub hints: Option<Box<EndpointHints>>,
}

/// Which nodes and zones an endpoint is meant for (KEP-2433, KEP-3015).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointHints {
    /// `hints.forNodes[].name`.
    pub nodes: Vec<NodeName>,
    /// `hints.forZones[].name`.
    pub zones: Vec<Arc<str>>,
}

/// A pod, for names and for traces. Its wiring is an [`Attachment`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `spec.nodeName`.
    pub node: Option<NodeName>,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// `spec.hostNetwork`: its addresses are the node's.
    pub host_network: bool,
}

/// What names a pod interface: the runtime's container ID and interface name
/// (CNI specification, "Parameters").
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentKey {
    /// `CNI_CONTAINERID`.
    pub container: Arc<str>,
    /// `CNI_IFNAME`.
    pub interface: Arc<str>,
}

impl fmt::Display for AttachmentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container, self.interface)
    }
}

/// A pod interface on this node that the CNI plugin was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Container and interface.
    pub key: AttachmentKey,
    /// `CNI_NETNS`: the path of the pod's network namespace.
    pub namespace_path: Arc<str>,
    /// The pod, if the runtime named it in `CNI_ARGS`.
    pub pod: Option<ObjectKey>,
    /// The addresses that it holds, with the length of the node's pod prefix.
    pub addresses: Vec<IpNet>,
    /// The name of the veth's end on the node.
    pub host_interface: Arc<str>,
    /// The hardware address of the pod's end.
    pub mac: MacAddress,
}

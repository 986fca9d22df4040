//! Golden files of both directions, and properties of the codecs.

use std::net::{Ipv4Addr, Ipv6Addr};

use portolan_ipam::flannel::{
    Attributes, Backend, BackendKind, ConfigError, Environment, NetworkSource, Subnet, Tunnel, VxlanData,
    WireguardData, WireguardMode, parse_network_config,
};
use proptest::prelude::*;

/// Values as flanneld 0.28 writes them: keys and values by the lines of a file.
const LEASES: &str = include_str!("golden/leases.txt");
const ENVIRONMENTS: [&str; 3] = [
    include_str!("golden/subnet-ipv4.env"),
    include_str!("golden/subnet-ipv6.env"),
    include_str!("golden/subnet-dual.env"),
];

fn golden_leases() -> impl Iterator<Item = (&'static str, &'static str)> {
    LEASES.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '))
}

#[test]
fn leases_of_flanneld_are_read_and_written_byte_for_byte() {
    let mut kinds = Vec::new();
    for (key, value) in golden_leases() {
        let subnet: Subnet = key.parse().unwrap();
        assert_eq!(subnet.to_string(), key);
        let attributes = Attributes::parse(value.as_bytes()).unwrap();
        assert_eq!(attributes.render(), value);
        // What is understood of the value gives the same value again.
        let tunnel = attributes.tunnel(&subnet).unwrap_or_else(|error| panic!("{key}: {error}"));
        assert_eq!(Attributes::new(attributes.public_v4, attributes.public_v6, &tunnel).render(), value);
        kinds.push(attributes.backend);
    }
    for kind in ["vxlan", "wireguard", "host-gw", "ipip", "extension", ""] {
        assert!(kinds.iter().any(|it| &**it == kind), "no golden lease of {kind:?}");
    }
}

#[test]
fn values_of_older_and_other_writers_are_read() {
    let read = |text: &str| Attributes::parse(text.as_bytes()).unwrap();
    let subnet: Subnet = "10.5.34.0-24".parse().unwrap();
    let old = read(r#" { "publicip" : "1.2.3.4", "Unknown": 1, "BackendData": null } "#);
    assert_eq!(old.public_v4, Some(Ipv4Addr::new(1, 2, 3, 4)));
    assert_eq!(old.tunnel(&subnet), Ok(Tunnel::Udp));
    let spaced =
        read(r#"{"PublicIP":"::ffff:1.2.3.4","BackendType":"VXLAN","BackendData":{ "vtepmac":"c6:d2:32:6f:8f:44" }}"#);
    let Ok(Tunnel::Vxlan { v4: Some(data), v6: None }) = spaced.tunnel(&subnet) else { panic!("{spaced:?}") };
    assert_eq!((data.vni, data.vtep_mac.to_string().as_str()), (None, "c6:d2:32:6f:8f:44"));
}

#[test]
fn bad_values_say_what_is_wrong() {
    let subnet: Subnet = "10.5.34.0-24".parse().unwrap();
    let dual: Subnet = "10.5.34.0-24&fd00:1::-64".parse().unwrap();
    for (value, subnet, wanted) in [
        ("", subnet, "not a JSON object"),
        ("[1]", subnet, "not a JSON object"),
        ("{\"PublicIP\":17}", subnet, "PublicIP is 17"),
        ("{\"PublicIP\":\"one\"}", subnet, "PublicIP \"one\" is not the address"),
        ("{\"PublicIP\":\"fe80::1\"}", subnet, "PublicIP \"fe80::1\" is not the address"),
        ("{\"PublicIP\":\"0.0.0.0\",\"PublicIPv6\":null}", subnet, "PublicIP (none)"),
        ("{\"PublicIP\":\"127.0.0.1\"}", subnet, "PublicIP 127.0.0.1"),
        ("{\"PublicIP\":\"224.0.0.1\"}", subnet, "PublicIP 224.0.0.1"),
        ("{\"PublicIP\":\"10.5.34.9\"}", subnet, "PublicIP 10.5.34.9"),
        (
            "{\"PublicIP\":\"1.2.3.4\",\"BackendType\":\"ipsec\"}",
            subnet,
            "`ipsec` is unknown: known are vxlan, host-gw",
        ),
        ("{\"PublicIP\":\"1.2.3.4\",\"BackendType\":\"vxlan\"}", subnet, "BackendData of the vxlan backend is (none)"),
        (
            "{\"PublicIP\":\"1.2.3.4\",\"BackendType\":\"vxlan\",\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"01:00:00:00:00:01\"}}",
            subnet,
            "BackendData of the vxlan backend is {\"VNI\":1",
        ),
        (
            "{\"PublicIP\":\"1.2.3.4\",\"BackendType\":\"vxlan\",\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:01\"}}",
            dual,
            "BackendV6Data of the vxlan backend is (none)",
        ),
        (
            "{\"PublicIP\":\"1.2.3.4\",\"BackendType\":\"wireguard\",\"BackendData\":{\"PublicKey\":\"short\"}}",
            subnet,
            "base64 of 32 bytes",
        ),
    ] {
        let error = Attributes::parse(value.as_bytes()).and_then(|it| it.tunnel(&subnet)).unwrap_err().to_string();
        assert!(error.contains(wanted), "{value}: {error}");
    }
}

#[test]
fn subnet_files_are_read_and_written_byte_for_byte() {
    for text in ENVIRONMENTS {
        assert_eq!(Environment::parse(text).unwrap().to_string(), text);
    }
    let dual = Environment::parse(ENVIRONMENTS[2]).unwrap();
    assert_eq!(dual.subnet().unwrap().to_string(), "10.5.34.0-24&fd00:5:0:34::-64");
}

fn config(text: &str) -> Result<portolan_ipam::flannel::ParsedConfig, ConfigError> {
    parse_network_config(text, NetworkSource::Leases)
}

fn pool(text: &str) -> String {
    let parsed = config(text).unwrap();
    let pools = [parsed.config.v4, parsed.config.v6];
    let pools: Vec<String> =
        pools.iter().flatten().map(|it| format!("{} {} {}", it.network, it.first, it.last)).collect();
    pools.join("; ")
}

#[test]
fn defaults_are_flannels() {
    // Cases of pkg/subnet/config_test.go, by their outcome.
    assert_eq!(pool(r#"{"Network":"10.3.0.0/16"}"#), "10.3.0.0/16 10.3.1.0/24 10.3.255.0/24");
    assert_eq!(pool(r#"{"Network":"10.3.0.0/22"}"#), "10.3.0.0/22 10.3.1.0/24 10.3.3.0/24");
    assert_eq!(pool(r#"{"Network":"10.3.0.0/23"}"#), "10.3.0.0/23 10.3.0.128/25 10.3.1.128/25");
    assert_eq!(pool(r#"{"Network":"10.3.0.0/28"}"#), "10.3.0.0/28 10.3.0.4/30 10.3.0.12/30");
    assert_eq!(pool(r#"{"Network":"10.3.7.9/16","SubnetLen":28}"#), "10.3.0.0/16 10.3.0.16/28 10.3.255.240/28");
    let bounded = r#"{"network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0"}"#;
    assert_eq!(pool(bounded), "10.3.0.0/16 10.3.5.0/24 10.3.8.0/24");
    assert_eq!(pool(r#"{"Network":"255.0.0.0/8"}"#), "255.0.0.0/8 255.0.1.0/24 255.255.255.0/24");
    let v6 = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#;
    assert_eq!(pool(v6), "fc00::/48 fc00:0:0:1::/64 fc00:0:0:ffff::/64");
    let dual = r#"{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/124"}"#;
    assert_eq!(pool(dual), "10.3.0.0/16 10.3.1.0/24 10.3.255.0/24; fc00::/124 fc00::4/126 fc00::c/126");
    let parsed = config(r#"{"Network":"10.3.0.0/16"}"#).unwrap();
    assert_eq!(parsed.config.backend.kind(), BackendKind::Udp);
    assert!(parsed.notes.is_empty() && !parsed.config.enable_nftables);
}

#[test]
fn bad_configs_name_the_field() {
    for (text, wanted) in [
        ("", "not JSON"),
        ("7", "not a JSON object"),
        ("{}", "Network is missing"),
        (r#"{"Network":"10.3.0.0"}"#, "Network of the network config, `10.3.0.0`, is not an IPv4 prefix"),
        (r#"{"Network":"fd00::/48"}"#, "is not an IPv4 prefix"),
        (r#"{"Network":"10.3.0.0/29"}"#, "Network 10.3.0.0/29 is too small"),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#, "use a SubnetLen of 18 or more"),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":31}"#, "SubnetLen is 31"),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":-1}"#, "SubnetLen of the network config is -1"),
        (r#"{"Network":"10.3.0.0/16","SubnetLen":"24"}"#, "SubnetLen of the network config is \"24\""),
        (r#"{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}"#, "SubnetMin 10.4.0.0 is not in the network"),
        (r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.1.7"}"#, "the nearest is 10.3.1.0"),
        (r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.8.0"}"#, "swap them"),
        (r#"{"EnableIPv4":false}"#, "enables no family"),
        (r#"{"EnableIPv4":false,"EnableIPv6":true}"#, "IPv6Network is missing"),
        (
            r#"{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fc00::/125"}"#,
            "IPv6Network fc00::/125 is too small",
        ),
        (r#"{"Network":"10.3.0.0/16","Backend":"vxlan"}"#, "Backend of the network config is \"vxlan\""),
        (r#"{"Network":"10.3.0.0/16","Backend":{}}"#, "Backend.Type is missing"),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"ipsec"}}"#,
            "`ipsec` is not a backend of ours: use one of vxlan",
        ),
        (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"tencent-vpc"}}"#, "`tencent-vpc` is not"),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
            "Backend.VNI of the network config is 16777216",
        ),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","Port":"8472"}}"#,
            "Backend.Port of the network config is \"8472\"",
        ),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":70000}}"#,
            "Backend.Port of the network config is 70000",
        ),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","PSK":"secret"}}"#,
            "Backend.PSK is not a WireGuard key",
        ),
        (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","Mode":"both"}}"#, "Backend.Mode `both`"),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","MTU":100}}"#,
            "Backend.MTU of the network config is 100",
        ),
    ] {
        let error = config(text).unwrap_err().to_string();
        assert!(error.contains(wanted), "{text}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn every_backend_has_its_options() {
    let backend = |text: &str| config(&format!(r#"{{"Network":"10.3.0.0/16","Backend":{text}}}"#)).unwrap();
    let vxlan = r#"{"Type":"VXLAN","VNI":4096,"Port":4789,"GBP":true,"Learning":true,"DirectRouting":true,"MTU":9000,"MacPrefix":"0E-2A"}"#;
    let parsed = backend(vxlan);
    let Backend::Vxlan(vxlan) = &parsed.config.backend else { panic!("{parsed:?}") };
    assert_eq!((vxlan.vni.get(), vxlan.port.map(portolan_net::Port::get), vxlan.mtu), (4096, Some(4789), Some(9000)));
    assert!(vxlan.group_policy && vxlan.learning && vxlan.direct_routing);
    assert_eq!(parsed.notes[0].text, "means something on Windows only");
    let Backend::Vxlan(vxlan) = backend(r#"{"Type":"vxlan"}"#).config.backend else { panic!() };
    assert_eq!((vxlan.vni.get(), vxlan.port, vxlan.mtu, vxlan.direct_routing), (1, None, None, false));
    let key = "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789+/AbCdE=";
    let text = format!(
        r#"{{"Type":"wireguard","PSK":"{key}","Mode":"auto","PersistentKeepaliveInterval":25,"ListenPort":51}}"#
    );
    let parsed = backend(&text);
    let Backend::Wireguard(wireguard) = &parsed.config.backend else { panic!("{parsed:?}") };
    assert_eq!(wireguard.preshared_key.as_ref().unwrap().expose(), key);
    assert!(!format!("{parsed:?}").contains(key), "keys are not printed");
    assert_eq!((wireguard.mode, wireguard.keepalive_s), (WireguardMode::Auto, Some(25)));
    assert_eq!((wireguard.listen_port.get(), wireguard.listen_port_v6.get()), (51, 51821));
    let parsed = backend(r#"{"Type":"host-gw","DirectRouting":true}"#);
    assert_eq!(parsed.config.backend, Backend::HostGateway);
    assert_eq!(parsed.notes[0].field, "Backend.DirectRouting");
    assert_eq!(
        backend(r#"{"Type":"ipip","DirectRouting":true}"#).config.backend,
        Backend::Ipip { direct_routing: true }
    );
    assert_eq!(backend(r#"{"Type":"alloc"}"#).config.backend, Backend::Alloc);
    let Backend::Udp { port } = backend(r#"{"Type":"udp"}"#).config.backend else { panic!() };
    assert_eq!(port.get(), 8285);
    let Backend::Extension(commands) = backend(r#"{"Type":"extension","SubnetAddCommand":"true"}"#).config.backend
    else {
        panic!()
    };
    assert_eq!((commands.subnet_added.as_str(), commands.before_start.as_str()), ("true", ""));
}

#[test]
fn kube_flannels_file_is_the_same_code_without_pools() {
    let text = r#"{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"},"Comment":"x"}"#;
    let parsed = parse_network_config(text, NetworkSource::Kubernetes).unwrap();
    assert!(parsed.config.enable_nftables);
    assert_eq!(parsed.notes[0].field, "Comment");
    assert!(parse_network_config(r#"{"Network":"10.244.0.0/30"}"#, NetworkSource::Kubernetes).is_ok());
}

fn any_tunnel() -> impl Strategy<Value = Tunnel> {
    let vxlan = (any::<u16>(), any::<[u8; 5]>()).prop_map(|(vni, mac)| {
        let data = VxlanData { vni: Some(vni), vtep_mac: portolan_net::MacAddress::local(mac) };
        Tunnel::Vxlan { v4: Some(data), v6: Some(data) }
    });
    let wireguard = "[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=".prop_map(|key| {
        let data = WireguardData { public_key: key.into() };
        Tunnel::Wireguard { v4: Some(data.clone()), v6: Some(data) }
    });
    let extension = ".{0,40}".prop_map(|text| {
        // As Go writes a string, which is what Flannel makes of a command's output.
        let value = format!("{{\"BackendType\":\"extension\",\"BackendData\":{}}}", serde_json::Value::from(text));
        Tunnel::Extension { data: Attributes::parse(value.as_bytes()).unwrap().data_v4 }
    });
    prop_oneof![vxlan, wireguard, extension, Just(Tunnel::HostGateway), Just(Tunnel::Ipip), Just(Tunnel::Udp)]
}

proptest! {
    #[test]
    fn every_value_comes_back(tunnel in any_tunnel(), v4 in 0x0100_0000u32..0x7e00_0000, v6 in any::<u64>()) {
        let (v4, v6) = (Ipv4Addr::from(v4), Ipv6Addr::from((0x2001_0db8u128 << 96) | u128::from(v6)));
        let subnet: Subnet = "192.168.34.0-24&fd00:1::-64".parse().unwrap();
        let attributes = Attributes::new(Some(v4), Some(v6), &tunnel);
        let read = Attributes::parse(attributes.render().as_bytes()).unwrap();
        prop_assert_eq!(&read, &attributes);
        prop_assert_eq!(read.tunnel(&subnet), Ok(tunnel));
    }

    #[test]
    fn no_value_panics(text in "[{}\"\\[\\]:,a-zA-Z0-9. ]{0,60}") {
        let _ = Attributes::parse(text.as_bytes());
        let _ = config(&text);
    }

    #[test]
    fn no_config_panics(network in "[0-9]{1,3}\\.[0-9]{1,3}\\.0\\.0/[0-9]{1,2}", length in -2i64..40, min in 0u32..,
                        v6 in "[0-9a-f:]{2,12}/[0-9]{1,3}", length_v6 in 0i64..140) {
        let text = format!(r#"{{"Network":"{network}","SubnetLen":{length},"SubnetMin":"{}","EnableIPv6":true,
            "IPv6Network":"{v6}","IPv6SubnetLen":{length_v6}}}"#, Ipv4Addr::from(min));
        for source in [NetworkSource::Leases, NetworkSource::Kubernetes] {
            if let Ok(parsed) = parse_network_config(&text, source) {
                let pool = parsed.config.v4.unwrap();
                prop_assert!(pool.network.contains(&pool.first) && pool.network.contains(&pool.last));
            }
        }
    }

    #[test]
    fn free_subnets_are_the_first_that_overlap_nothing(
        taken in proptest::collection::vec((0u32..1024, 22u8..=32), 0..12), limit in 0usize..20,
    ) {
        let parsed = config(r#"{"Network":"10.3.0.0/22","SubnetLen":26}"#).unwrap();
        let pool = parsed.config.v4.unwrap();
        let prefix = |low: u32, length| ipnet::IpNet::new(Ipv4Addr::from(0x0a03_0000 + low).into(), length).unwrap().trunc();
        let taken: Vec<_> = taken.into_iter().map(|(low, length)| prefix(low, length)).collect();
        let overlaps = |one: &ipnet::IpNet| taken.iter().any(|other| one.contains(other) || other.contains(one));
        let wanted: Vec<_> = (1..16).map(|number| prefix(number * 64, 26)).filter(|it| !overlaps(it)).take(limit).collect();
        prop_assert_eq!(pool.free(&taken, limit), wanted);
    }
}

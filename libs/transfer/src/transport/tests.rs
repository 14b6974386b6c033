use types::ErrorCode;

use super::*;
use crate::mem::Faults;
use crate::{MemNetwork, TcpTransport, tcp};

#[tokio::test]
async fn the_scheme_of_an_endpoint_chooses_the_transport() {
    let mem: Arc<dyn Transport> = MemNetwork::new(0, Faults::default()).join("a", Epoch(1));
    let address = "127.0.0.1:0".parse().unwrap();
    let tcp: Arc<dyn Transport> = TcpTransport::bind(address, Epoch(1), tcp::Config::default())
        .await
        .unwrap();
    let both = [mem.clone(), tcp.clone()];
    for transport in &both {
        let chosen = choose(&both, &transport.endpoint()).unwrap();
        assert_eq!(chosen.name(), transport.name());
    }
    for endpoint in ["", "tcp", "ucx://127.0.0.1:1", "127.0.0.1:80", "TCP://a:1"] {
        let error = choose(&both, endpoint).err().unwrap();
        assert_eq!(error.code(), ErrorCode::Invalid, "{endpoint}");
    }
}

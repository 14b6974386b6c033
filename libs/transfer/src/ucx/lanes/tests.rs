use super::*;

const OF_1_13: &str = "#
# UCP endpoint
#
#               peer: <no debug data>
#                 lane[0]:  3:sysv/memory.0 md[2]           -> md[2]/sysv/sysdev[255] am am_bw#0
#                 lane[1]:  4:posix/memory.0 md[3]          -> md[3]/posix/sysdev[255]
#                 lane[2]:  5:cma/memory.0 md[4]            -> md[4]/cma/sysdev[255] rma_bw#0
#
#                 am_send: 0..<egr/short>..93..<egr/bcopy>..8256..<rndv>..(inf)
";

const OF_1_22: &str = "# UCP endpoint
#               peer: <no debug data>
#                 lane[0]:  2:tcp/lo.0 md[1]                -> md[1]/tcp/sysdev[255] seg 4294967295 rma_bw#0 am
#                 lane[1]:  1:tcp/eth0.0 md[1]              -> md[1]/tcp/sysdev[255] seg 4294967295 rma_bw#1 wireup
";

const OF_A_NIC: &str = "#  lane[0]:  7:rc_mlx5/mlx5_0:1.0 md[4] -> md[4]/ib/sysdev[2] rma_bw#0 am keepalive
#  lane[1]:  7:rc_mlx5/mlx5_0:1.1 md[4] -> md[4]/ib/sysdev[2] rma_bw#1";

#[test]
fn lanes_are_read_from_both_generations_of_descriptions() {
    assert_eq!(parse(OF_1_13), ["sysv/memory", "posix/memory", "cma/memory"]);
    assert_eq!(parse(OF_1_22), ["tcp/lo", "tcp/eth0"]);
    assert_eq!(parse(OF_A_NIC), ["rc_mlx5/mlx5_0:1"]);
}

#[test]
fn only_tcp_offers_no_more_than_tcp() {
    assert!(offer_more_than_tcp(&parse(OF_1_13)));
    assert!(offer_more_than_tcp(&parse(OF_A_NIC)));
    assert!(!offer_more_than_tcp(&parse(OF_1_22)));
    assert!(!offer_more_than_tcp(&[]));
}

#[test]
fn what_is_no_description_has_no_lanes() {
    for text in ["", "lane[", "lane[0]:", "lane[0]: x:y", "# lane[0]: tcp/lo.0"] {
        assert_eq!(parse(text), Vec::<String>::new(), "{text}");
    }
}

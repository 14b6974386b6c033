//! What UCX uses between two workers, read from its own description of an endpoint.
//!
//! UCX 1.13 has no call that lists the transports of an endpoint, so its printed description is read. What cannot be
//! understood is left out: it decides nothing but whether UCX offers more than TCP, and what is shown to people.

/// Transports that are no better than the built-in one.
const NO_BETTER_THAN_TCP: [&str; 2] = ["tcp", "self"];

/// The transports of an endpoint with their devices, such as `rc_mlx5/mlx5_0:1`, without repetitions, in UCX's order.
/// A line reads `lane[0]:  3:sysv/memory.0 md[2] -> md[2]/sysv/sysdev[255] am am_bw#0`.
pub(super) fn parse(description: &str) -> Vec<String> {
    let mut lanes: Vec<String> = Vec::new();
    for line in description.lines() {
        let Some((_, lane)) = line.split_once("lane[") else {
            continue;
        };
        let named = lane
            .split_whitespace()
            .find_map(|word| word.split_once(':').filter(|(number, _)| is_number(number)));
        let Some((_, resource)) = named else {
            continue;
        };
        // The number behind the last dot is that of UCX's path through the device.
        let resource = match resource.rsplit_once('.') {
            Some((resource, path)) if is_number(path) => resource,
            _ => resource,
        };
        if !lanes.iter().any(|known| known == resource) {
            lanes.push(resource.to_owned());
        }
    }
    lanes
}

/// Whether one of the lanes moves bytes in a way that plain TCP does not.
pub(super) fn offer_more_than_tcp(lanes: &[String]) -> bool {
    lanes.iter().any(|lane| {
        let transport = lane.split('/').next().unwrap_or(lane);
        !NO_BETTER_THAN_TCP.contains(&transport)
    })
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests;

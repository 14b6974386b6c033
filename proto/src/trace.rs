//! The trace of a call, in its metadata.

use tonic::metadata::MetadataMap;
use types::TraceParent;

/// What the caller says, if it says anything that can be read.
pub fn read(metadata: &MetadataMap) -> Option<TraceParent> {
    TraceParent::parse(metadata.get(TraceParent::HEADER)?.to_str().ok()?)
}

/// Says that a call is a part of `parent`'s trace.
pub fn write(metadata: &mut MetadataMap, parent: TraceParent) {
    let value = parent.to_string().parse().expect("hexadecimal digits are ASCII");
    metadata.insert(TraceParent::HEADER, value);
}

//! Builds of different versions understand each other, as they must while a cluster is upgraded node by node.
//!
//! `pinned/` has the contracts of older builds, as descriptors. `PERIGEE_PIN=NAME` adds this build's. Those of versions that no upgrade begins
//! with any more may go.

use std::path::{Path, PathBuf};

use prost::Message;
use prost_reflect::prost_types::{FileDescriptorProto, FileDescriptorSet};
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage, Value,
};

/// Messages within messages that are filled; a deeper one stays empty.
const DEPTH_MAX: usize = 6;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pinned")
}

fn this_build() -> DescriptorPool {
    DescriptorPool::decode(proto::DESCRIPTORS).expect("descriptors")
}

/// Comments are most of a contract, and nothing on the wire.
fn without_comments(pool: &DescriptorPool) -> Vec<u8> {
    let files = pool.files().map(|file| FileDescriptorProto {
        source_code_info: None,
        ..file.file_descriptor_proto().clone()
    });
    let set = FileDescriptorSet {
        file: files.collect(),
    };
    set.encode_to_vec()
}

/// The contracts of older builds, by file.
fn older_builds() -> Vec<(String, DescriptorPool)> {
    if let Ok(name) = std::env::var("PERIGEE_PIN") {
        let file = folder().join(format!("{name}.binpb"));
        std::fs::write(file, without_comments(&this_build())).expect("written");
    }
    let files = std::fs::read_dir(folder()).expect("a folder");
    let mut pinned: Vec<PathBuf> = files.map(|file| file.expect("a file").path()).collect();
    pinned.sort();
    assert!(!pinned.is_empty(), "no older build is pinned");
    let read = |file: PathBuf| {
        let descriptors = std::fs::read(&file).expect("readable");
        let pool = DescriptorPool::decode(&descriptors[..]).expect("descriptors");
        (file.display().to_string(), pool)
    };
    pinned.into_iter().map(read).collect()
}

/// What decides how a field is written: its type, and whether there are many.
fn form(field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(message) => message.full_name().to_owned(),
        Kind::Enum(values) => values.full_name().to_owned(),
        scalar => format!("{scalar:?}"),
    };
    let oneof = field.containing_oneof().map(|oneof| oneof.name().to_owned());
    format!("{kind}, {:?}, within {oneof:?}", field.cardinality())
}

/// A message with every field, each of which has a value of its own. Of fields that exclude each other it has the first.
fn filled(of: &MessageDescriptor, depth: usize) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        let first = |oneof: prost_reflect::OneofDescriptor| oneof.fields().map(|field| field.number()).min();
        let excluded = field
            .containing_oneof()
            .and_then(first)
            .is_some_and(|first| first != field.number());
        if excluded || depth == DEPTH_MAX {
            continue;
        }
        let value = match field.kind() {
            Kind::Message(entry) if field.is_map() => {
                let value = value(&entry.map_entry_value_field(), depth);
                Value::Map([(key(&entry), value)].into())
            }
            _ if field.is_list() => Value::List(vec![value(&field, depth); 2]),
            _ => value(&field, depth),
        };
        message.set_field(&field, value);
    }
    message
}

fn key(entry: &MessageDescriptor) -> MapKey {
    match entry.map_entry_key_field().kind() {
        Kind::String => MapKey::String("key".to_owned()),
        Kind::Uint32 => MapKey::U32(7),
        Kind::Uint64 => MapKey::U64(7),
        other => panic!("{}: keys of {other:?} are not made here yet", entry.full_name()),
    }
}

fn value(field: &FieldDescriptor, depth: usize) -> Value {
    let number = field.number();
    match field.kind() {
        Kind::Double => Value::F64(f64::from(number) + 0.5),
        Kind::Float => Value::F32(number as f32 + 0.5),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(-(number as i32)),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(-i64::from(number)),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(number),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(u64::from(number) << 40),
        Kind::Bool => Value::Bool(true),
        Kind::String => Value::String(format!("field {number}")),
        Kind::Bytes => Value::Bytes(vec![number as u8; 3].into()),
        Kind::Enum(values) => Value::EnumNumber(values.values().last().expect("an enum has values").number()),
        Kind::Message(message) => Value::Message(filled(&message, depth + 1)),
    }
}

/// The fields that the message's own build knows.
fn known(message: &DynamicMessage) -> String {
    let shown = |value: &Value| match value {
        Value::Message(message) => known(message),
        scalar => format!("{scalar:?}"),
    };
    let descriptor = message.descriptor();
    let fields = descriptor
        .fields()
        .filter(|field| message.has_field(field))
        .map(|field| {
            let value = message.get_field(&field);
            match &*value {
                Value::List(values) => format!(
                    "{}={:?}",
                    field.name(),
                    values.iter().map(shown).collect::<Vec<_>>()
                ),
                Value::Map(values) => format!(
                    "{}={:?}",
                    field.name(),
                    values.values().map(shown).collect::<Vec<_>>()
                ),
                one => format!("{}={}", field.name(), shown(one)),
            }
        });
    format!("({})", fields.collect::<Vec<_>>().join(" "))
}

fn read_as(message: &DynamicMessage, of: &MessageDescriptor) -> DynamicMessage {
    DynamicMessage::decode(of.clone(), &message.encode_to_vec()[..]).expect("it is understood")
}

#[test]
fn what_an_older_build_says_means_the_same_now() {
    let now = this_build();
    for (file, older) in older_builds() {
        for message in older.all_messages() {
            let name = message.full_name();
            let newer = now.get_message_by_name(name);
            let newer = newer.unwrap_or_else(|| panic!("{file}: {name} is gone"));
            for field in message.fields() {
                let (number, name) = (field.number(), field.full_name().to_owned());
                let newer = newer.get_field(number);
                let newer = newer.unwrap_or_else(|| panic!("{file}: {name} is gone"));
                assert_eq!(
                    (newer.name(), form(&newer)),
                    (field.name(), form(&field)),
                    "{file}: {name}"
                );
            }
        }
        for values in older.all_enums() {
            let newer = now.get_enum_by_name(values.full_name()).expect("an enum stays");
            for value in values.values() {
                let newer = newer.get_value(value.number()).expect("a value stays");
                assert_eq!(newer.name(), value.name(), "{file}");
            }
        }
    }
}

#[test]
fn what_an_older_build_calls_is_there_now() {
    let now = this_build();
    for (file, older) in older_builds() {
        let mut methods = 0;
        for service in older.services() {
            let newer = now.get_service_by_name(service.full_name());
            let newer = newer.unwrap_or_else(|| panic!("{file}: {} is gone", service.full_name()));
            for method in service.methods() {
                let shape = |method: &prost_reflect::MethodDescriptor| {
                    let streams = (method.is_client_streaming(), method.is_server_streaming());
                    (
                        method.input().full_name().to_owned(),
                        method.output().full_name().to_owned(),
                        streams,
                    )
                };
                let found = newer.methods().find(|found| found.name() == method.name());
                let found = found.unwrap_or_else(|| panic!("{file}: {} is gone", method.full_name()));
                assert_eq!(shape(&found), shape(&method), "{file}: {}", method.full_name());
                methods += 1;
            }
        }
        assert!(
            methods > 30,
            "{file} has {methods} methods: it is no whole contract"
        );
    }
}

#[test]
fn messages_of_either_build_are_understood_by_the_other() {
    let now = this_build();
    for (file, older) in older_builds() {
        for before in older.all_messages() {
            let after = now
                .get_message_by_name(before.full_name())
                .expect("a message stays");
            let said = filled(&before, 0);
            // An older build's message comes whole, and an answer that repeats it is what the older build said.
            let heard = read_as(&said, &after);
            assert_eq!(
                heard.unknown_fields().count(),
                0,
                "{file}: {}",
                before.full_name()
            );
            assert_eq!(read_as(&heard, &before), said, "{file}: {}", before.full_name());
            // A newer build's message has in it what the older build looks for.
            let heard = read_as(&filled(&after, 0), &before);
            assert_eq!(known(&heard), known(&said), "{file}: {}", before.full_name());
        }
    }
}

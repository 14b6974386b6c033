//! The bindings say what the headers of the installed UCX say.
//!
//! Headers are looked for in `UCX_INCLUDE` and where the C compiler looks; without them the test says that it skips.
#![allow(clippy::unwrap_used)] // A test.
#![allow(clippy::cast_possible_wrap, clippy::unnecessary_cast)] // The constants' types are the generator's choice.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::PathBuf;
use std::process::Command;

use ucx_sys::*;

struct Expected {
    /// A C expression, and its value in the bindings.
    exact: Vec<(String, i64)>,
    /// Structs grow from version to version; what the bindings know is a part of what there is.
    at_least: Vec<(String, i64)>,
}

macro_rules! structs {
    ($expected:ident: $($name:ident { $($field:ident),* $(,)? })*) => {$(
        $expected.at_least.push((format!("sizeof({})", stringify!($name)), size_of::<$name>() as i64));
        $($expected.exact.push((
            format!("offsetof({}, {})", stringify!($name), stringify!($field)),
            offset_of!($name, $field) as i64,
        ));)*
    )*};
}

macro_rules! constants {
    ($expected:ident: $($name:ident),* $(,)?) => {
        $($expected.exact.push((format!("(long long){}", stringify!($name)), $name as i64));)*
    };
}

fn expected() -> Expected {
    let mut expected = Expected {
        exact: Vec::new(),
        at_least: Vec::new(),
    };
    structs! { expected:
        ucp_params_t { field_mask, features, mt_workers_shared, estimated_num_eps }
        ucp_worker_params_t { field_mask, thread_mode, events, event_fd, flags }
        ucp_mem_map_params_t { field_mask, address, length, flags, prot, memory_type }
        ucp_mem_attr_t { field_mask, address, length, mem_type }
        ucp_ep_params_t { field_mask, address, err_mode, err_handler, user_data, flags }
        ucp_err_handler_t { cb, arg }
        ucp_request_param_t { op_attr_mask, flags, request, cb, datatype, user_data, memory_type, memh }
    }
    constants! { expected:
        UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP, UCP_PARAM_FIELD_FEATURES, UCP_WORKER_PARAM_FIELD_THREAD_MODE,
        UCS_THREAD_MODE_SINGLE, UCP_MEM_MAP_PARAM_FIELD_ADDRESS, UCP_MEM_MAP_PARAM_FIELD_LENGTH,
        UCP_MEM_MAP_PARAM_FIELD_FLAGS, UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE, UCP_MEM_MAP_ALLOCATE,
        UCP_MEM_MAP_NONBLOCK, UCP_MEM_ATTR_FIELD_ADDRESS, UCP_MEM_ATTR_FIELD_LENGTH,
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE, UCP_EP_PARAM_FIELD_ERR_HANDLER,
        UCP_ERR_HANDLING_MODE_NONE, UCP_ERR_HANDLING_MODE_PEER, UCP_EP_CLOSE_FLAG_FORCE,
        UCP_OP_ATTR_FIELD_CALLBACK, UCP_OP_ATTR_FIELD_USER_DATA, UCP_OP_ATTR_FIELD_FLAGS,
        UCP_OP_ATTR_FIELD_MEMORY_TYPE, UCS_MEMORY_TYPE_HOST, UCS_MEMORY_TYPE_CUDA, UCS_OK, UCS_INPROGRESS,
        UCS_ERR_BUSY, UCS_ERR_CANCELED, UCS_ERR_UNREACHABLE, UCS_ERR_LAST,
    }
    expected
}

#[test]
fn the_bindings_agree_with_the_installed_headers() {
    let expected = expected();
    let all = || expected.exact.iter().chain(&expected.at_least);
    let mut program =
        String::from("#include <stddef.h>\n#include <stdio.h>\n#include <ucp/api/ucp.h>\nint main(void) {\n");
    for (expression, _) in all() {
        writeln!(
            program,
            "printf(\"%s=%lld\\n\", \"{expression}\", (long long)({expression}));"
        )
        .unwrap();
    }
    program.push_str("return 0; }\n");

    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, binary) = (folder.join("headers.c"), folder.join("headers"));
    std::fs::write(&source, program).unwrap();
    let mut compiler = Command::new("cc");
    if let Some(include) = std::env::var_os("UCX_INCLUDE") {
        compiler.arg("-I").arg(include);
    }
    let compiled = compiler.arg("-o").arg(&binary).arg(&source).output();
    let compiled = compiled.expect("the build needs a C compiler too");
    if !compiled.status.success() {
        let error = String::from_utf8_lossy(&compiled.stderr);
        assert!(error.contains("ucp/api/ucp.h"), "{error}");
        eprintln!("skipped: no UCX headers here (Debian: libucx-dev)");
        return;
    }
    let output = Command::new(&binary).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let found: BTreeMap<&str, i64> = output
        .lines()
        .map(|line| line.rsplit_once('=').unwrap())
        .map(|(expression, value)| (expression, value.parse().unwrap()))
        .collect();
    assert_eq!(found.len(), all().count());
    for (expression, value) in &expected.exact {
        assert_eq!(found[expression.as_str()], *value, "{expression}");
    }
    for (expression, value) in &expected.at_least {
        assert!(found[expression.as_str()] >= *value, "{expression}");
    }
}

#[test]
fn a_library_that_is_not_there_is_said_to_be_missing() {
    let error = Library::load(Some("/nowhere/libucp.so.0".as_ref())).unwrap_err();
    assert!(matches!(error, LoadError::NotLoaded { .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/libucp.so.0"), "{error}");
}

#[test]
fn a_library_of_something_else_is_refused() {
    let error = Library::load(Some("libc.so.6".as_ref())).unwrap_err();
    assert!(matches!(error, LoadError::NotLoaded { .. }), "{error}");
}

#[test]
fn what_a_call_returned_is_told_apart() {
    assert_eq!(Begun::of(std::ptr::null_mut()), Begun::Done);
    let error = std::ptr::without_provenance_mut(UCS_ERR_UNREACHABLE as isize as usize);
    assert_eq!(Begun::of(error), Begun::Failed(UCS_ERR_UNREACHABLE));
    let mut request = 0_u64;
    let address = (&raw mut request).cast();
    assert_eq!(Begun::of(address), Begun::Request(address));
}

//! A JSON object that is taken apart until nothing is left.
//!
//! Every reader removes what it reads; [`Parameters::finish`] refuses what nobody removed. So a parameter that we do not
//! know cannot be ignored, whoever adds it. `null` means absent, as in OpenAI's API.

use serde_json::{Map, Value};
use types::Error;

/// What is left of a request's object.
#[derive(Debug)]
pub(super) struct Parameters {
    object: Map<String, Value>,
    /// Path to the object, for the names in errors: empty, or such as `messages[2].`.
    path: String,
}

impl Parameters {
    pub(super) fn new(object: Map<String, Value>) -> Self {
        let path = String::new();
        Self { object, path }
    }

    /// An object within another one.
    pub(super) fn within(path: String, value: Value) -> Result<Self, Error> {
        match value {
            Value::Object(object) => Ok(Self {
                object,
                path: format!("{path}."),
            }),
            other => Err(wrong(&path, "an object", &other)),
        }
    }

    /// Removes a parameter as it is.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        // Keeps the order of what is left, so that the first unknown parameter is the one that is named.
        self.object.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn take_bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        self.take_as(name, "true or false", |value| value.as_bool())
    }

    pub(super) fn take_string(&mut self, name: &str) -> Result<Option<String>, Error> {
        self.take_as(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A number, as near as `f32` comes to it. Ranges are checked where all parameters are.
    pub(super) fn take_f32(&mut self, name: &str) -> Result<Option<f32>, Error> {
        self.take_as(name, "a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    pub(super) fn take_f64(&mut self, name: &str) -> Result<Option<f64>, Error> {
        self.take_as(name, "a number", Value::as_f64)
    }

    /// An integer that is not negative.
    pub(super) fn take_u64(&mut self, name: &str) -> Result<Option<u64>, Error> {
        self.take_as(name, "an integer that is not negative", Value::as_u64)
    }

    pub(super) fn take_u32(&mut self, name: &str) -> Result<Option<u32>, Error> {
        let expected = "an integer from 0 to 4294967295";
        self.take_as(name, expected, |value| u32::try_from(value.as_u64()?).ok())
    }

    /// A parameter that may only say what happens anyway.
    pub(super) fn take_only(&mut self, name: &str, only: &Value) -> Result<(), Error> {
        match self.take(name) {
            None => Ok(()),
            Some(value) if value == *only => Ok(()),
            Some(value) => {
                let name = self.name(name);
                let message = format!("{name} is {value}, but only {only} is supported");
                Err(Error::invalid(name, message))
            }
        }
    }

    /// Refuses what nobody took.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.object.keys().next() {
            None => Ok(()),
            // An unsupported parameter is refused even as `null`: it is a name that we do not know.
            Some(name) => {
                let name = self.name(name);
                Err(Error::invalid(&name, format!("{name} is not supported")))
            }
        }
    }

    /// The parameter's name from the outside.
    pub(super) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    fn take_as<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => Err(wrong(&self.name(name), expected, &value)),
        }
    }
}

/// A value of the wrong type. Shows what it is, not all that it holds.
pub(super) fn wrong(name: &str, expected: &str, value: &Value) -> Error {
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    Error::invalid(name, format!("{name} is {found}, but must be {expected}"))
}

//! Jinja's globals that are classes: called to make an object, and written by name.

use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr};
use minijinja::{Environment, Error, State, Value};

/// A class of Python's, and what makes an object of it.
#[derive(Debug)]
pub(super) struct Class {
    name: &'static str,
    make: Value,
}

/// Puts classes around the functions of an environment that make their objects.
pub(super) fn name_all(environment: &mut Environment<'_>) {
    let names = [
        ("cycler", "jinja2.utils.Cycler"),
        ("dict", "dict"),
        ("joiner", "jinja2.utils.Joiner"),
        ("namespace", "jinja2.utils.Namespace"),
    ];
    for (global, name) in names {
        let made = environment.globals().find(|(known, _)| *known == global).map(|(_, make)| make);
        if let Some(make) = made {
            environment.add_global(global, Value::from_object(Class { name, make }));
        }
    }
}

impl Class {
    pub(super) fn repr(&self) -> String {
        format!("<class '{}'>", self.name)
    }
}

impl Object for Class {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, given: &[Value]) -> Result<Value, Error> {
        self.make.call(state, given)
    }
}

//! Jinja's macros: minijinja's, called with the arguments that Jinja would find for each parameter.

use std::collections::BTreeSet;
use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Tuple};
use minijinja::{Error, State, Value};

use super::budget::Budget;
use super::operators::invalid;
use super::python;

/// The parameter that tells which of the others were given nothing. No template can name it.
pub(super) const MISSING: &str = ":missing";

/// What a macro is declared to take.
#[derive(Clone, Debug, Default)]
pub(super) struct Signature {
    /// A call block has none.
    pub(super) name: Option<String>,
    pub(super) parameters: Vec<String>,
    /// Whether the body names these; they come after the parameters, in this order.
    pub(super) takes_caller: bool,
    pub(super) takes_kwargs: bool,
    pub(super) takes_varargs: bool,
}

impl Object for Signature {}

#[derive(Debug)]
pub(super) struct Macro {
    signature: Signature,
    /// What runs: minijinja's macro, which takes [`Signature`]'s parameters, what comes after them, and
    /// [`MISSING`].
    body: Value,
    budget: Arc<Budget>,
}

/// Makes a macro of minijinja's and its signature.
pub(super) fn new(budget: &Arc<Budget>, body: Value, signature: &Value) -> Result<Value, Error> {
    let signature = signature.downcast_object_ref::<Signature>().cloned().unwrap_or_default();
    budget.visit()?;
    Ok(Value::from_object(Macro { signature, body, budget: Arc::clone(budget) }))
}

pub(super) fn is_macro(value: &Value) -> bool {
    value.downcast_object_ref::<Macro>().is_some()
}

impl Macro {
    fn has_explicit_caller(&self) -> bool {
        self.signature.parameters.iter().any(|name| name == "caller")
    }

    fn display_name(&self) -> String {
        self.signature.name.clone().unwrap_or_else(|| "anonymous".to_owned())
    }

    /// The arguments that the body takes.
    fn bind(&self, given: &[Value]) -> Result<Vec<Value>, Error> {
        let Signature { parameters, takes_caller, takes_kwargs, takes_varargs, .. } = &self.signature;
        let keywords = given.last().filter(|last| !last.is_undefined());
        let keywords = keywords.and_then(|last| Kwargs::try_from(last.clone()).ok());
        let places = given.get(..given.len() - usize::from(keywords.is_some())).unwrap_or_default();
        let keyword_count = keywords.iter().flat_map(Kwargs::args).count();
        self.budget.list(given.len().saturating_add(keyword_count).saturating_add(parameters.len()))?;
        (0..keyword_count).try_for_each(|_| self.budget.visit())?;
        let keyword = |name: &str| keywords.as_ref().filter(|all| all.has(name)).map(|all| all.peek(name));

        let mut bound: Vec<Value> = places.iter().take(parameters.len()).cloned().collect();
        let mut missing = vec![Value::from(false); bound.len()];
        let mut used = BTreeSet::new();
        let mut has_caller = bound.len() == parameters.len() && self.has_explicit_caller();
        for name in parameters.iter().skip(bound.len()) {
            has_caller |= name == "caller";
            let value = keyword(name).transpose()?;
            missing.push(Value::from(value.is_none()));
            if value.is_some() {
                used.insert(name.as_str());
            }
            bound.push(value.unwrap_or_default());
        }
        if *takes_caller && !has_caller {
            if self.has_explicit_caller() {
                return Err(invalid(format!("macro {}: two values for caller", self.display_name())));
            }
            let value = keyword("caller").transpose()?.filter(|value: &Value| !value.is_none());
            used.insert("caller");
            bound.push(value.unwrap_or_default());
        }
        let others: Vec<&str> =
            keywords.iter().flat_map(Kwargs::args).filter(|name| !used.contains(name)).collect();
        if *takes_kwargs {
            let pairs = others.iter().map(|name| Ok((*name, keyword(name).transpose()?.unwrap_or_default())));
            bound.push(Value::from_pairs(pairs.collect::<Result<Vec<(&str, Value)>, Error>>()?));
        } else if let Some(name) = others.first() {
            return Err(invalid(format!("macro {} takes no argument {name:?} here", self.display_name())));
        }
        let rest = places.get(parameters.len()..).unwrap_or_default();
        if *takes_varargs {
            bound.push(Value::from(Tuple::from(rest.to_vec())));
        } else if !rest.is_empty() {
            let most = parameters.len();
            return Err(invalid(format!("macro {} takes at most {most} arguments", self.display_name())));
        }
        bound.push(Value::from(missing));
        Ok(bound)
    }
}

impl Object for Macro {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let signature = &self.signature;
        Some(match key.as_str()? {
            "name" => Value::from(signature.name.clone()),
            "arguments" => {
                let names = signature.parameters.iter().map(Value::from);
                Value::from(Tuple::from(names.collect::<Vec<_>>()))
            }
            "caller" => Value::from(signature.takes_caller),
            "catch_kwargs" => Value::from(signature.takes_kwargs),
            "catch_varargs" => Value::from(signature.takes_varargs),
            "explicit_caller" => Value::from(self.has_explicit_caller()),
            _ => return None,
        })
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, given: &[Value]) -> Result<Value, Error> {
        self.body.call(state, &self.bind(given)?)
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.signature.name {
            Some(name) => write!(f, "<Macro {}>", python::quoted(name)),
            None => f.write_str("<Macro anonymous>"),
        }
    }
}

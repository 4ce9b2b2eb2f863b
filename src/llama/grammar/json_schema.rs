//! What is changed in a JSON schema before it is compiled.

use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// White space between two tokens of the JSON: a space, or a line end with indentation. Without a limit,
/// small models write white space until they reach `max_new_tokens`.
const WHITE_SPACE: &str = r"[ \t]|\n[ \t]{0,16}";
/// llguidance's own settings inside a schema.
const SETTINGS: &str = "x-guidance";

/// The most levels of a schema together with all that it refers to. llguidance calls itself for each, and
/// needs up to 5 KiB of stack for one.
const MAX_LEVELS: usize = 8000;

/// Reads a schema, and makes it one that llguidance compiles exactly.
pub(super) fn read(text: &str) -> std::result::Result<Value, String> {
    match serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))? {
        Value::Object(schema) => prepare(schema),
        _ => Err("is not a JSON object".into()),
    }
}

/// Makes a schema one that llguidance compiles exactly, within its stack.
fn prepare(schema: Map<String, Value>) -> std::result::Result<Value, String> {
    if schema.contains_key(SETTINGS) {
        return Err(format!("{SETTINGS} is not supported"));
    }
    let mut schema = distinguish(Value::Object(schema));
    let mut references = HashSet::new();
    let own = levels(&schema, &mut references);
    let others = references.iter().filter_map(|reference| referred(&schema, reference));
    let all = own + others.map(|found| levels(found, &mut HashSet::new())).sum::<usize>();
    if all > MAX_LEVELS {
        return Err(format!("has {all} levels, with all that it refers to; the limit is {MAX_LEVELS}"));
    }
    if let Value::Object(fields) = &mut schema {
        fields.insert(SETTINGS.into(), json!({ "whitespace_pattern": WHITE_SPACE }));
    }
    Ok(schema)
}

/// The most bytes of a grammar in Lark, without its schemas: llguidance takes the square of their time.
const MAX_LARK_BYTES: usize = 1 << 16;

/// Prepares the schemas that a grammar in Lark holds, each after `%json`.
pub(super) fn prepare_in_lark(lark: &str) -> std::result::Result<String, String> {
    const DIRECTIVE: &str = "%json";
    let (mut prepared, mut end, mut own) = (String::new(), 0, lark.len());
    for (at, _) in lark.match_indices(DIRECTIVE) {
        let start = at + DIRECTIVE.len();
        let mut values = serde_json::Deserializer::from_str(&lark[start..]).into_iter::<Value>();
        // Anything else is a text in the grammar, or for llguidance to refuse.
        let Some(Ok(Value::Object(schema))) = values.next() else { continue };
        let schema = prepare(schema)?;
        if at >= end {
            prepared += &format!("{} {schema}", &lark[end..start]);
            end = start + values.byte_offset();
            own -= values.byte_offset();
        }
    }
    if own > MAX_LARK_BYTES {
        return Err(format!("got {own} bytes without its schemas, expected at most {MAX_LARK_BYTES}"));
    }
    Ok(prepared + &lark[end..])
}

/// What llguidance finds at a `$ref`. It takes names as they are, without `~0`, `~1` and `%20`.
fn referred<'a>(schema: &'a Value, reference: &str) -> Option<&'a Value> {
    let mut names = reference.strip_prefix('#')?.split('/').skip(1).filter(|_| reference != "#/");
    names.try_fold(schema, |found, name| match found {
        Value::Array(items) => items.get(name.parse::<usize>().ok()?),
        found => found.get(name),
    })
}

/// The levels of a JSON value. Adds what it refers to.
fn levels(value: &Value, references: &mut HashSet<String>) -> usize {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(reference)) = fields.get("$ref") {
                references.insert(reference.clone());
            }
            1 + fields.values().map(|field| levels(field, references)).max().unwrap_or(0)
        }
        Value::Array(items) => 1 + items.iter().map(|item| levels(item, references)).max().unwrap_or(0),
        _ => 0,
    }
}

/// Makes `anyOf` of each `oneOf` whose alternatives exclude each other by a property: exactly one is valid
/// then if any is. Pydantic writes unions with a discriminator in this way. llguidance refuses a `oneOf`
/// unless it sees that the alternatives exclude each other, and it does not look behind `$ref`.
fn distinguish(mut schema: Value) -> Value {
    let mut places = Vec::new();
    find_unions(&schema, String::new(), &mut places);
    for place in places {
        let Some(tagged) = tagged_alternatives(&schema, &place) else { continue };
        let (tag, alternatives) = tagged;
        for alternative in alternatives {
            let Some(Value::Object(object)) = schema.pointer_mut(&alternative) else { continue };
            let required = object.entry("required").or_insert_with(|| json!([]));
            if let Value::Array(names) = required
                && !names.iter().any(|name| *name == tag)
            {
                names.push(tag.as_str().into());
            }
        }
        if let Some(Value::Object(union)) = schema.pointer_mut(&place)
            && let Some(alternatives) = union.remove("oneOf")
        {
            union.insert("anyOf".into(), alternatives);
        }
    }
    schema
}

/// The JSON pointers of all objects with a `oneOf` and no `anyOf`.
fn find_unions(value: &Value, pointer: String, places: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            if fields.get("oneOf").is_some_and(Value::is_array) && !fields.contains_key("anyOf") {
                places.push(pointer.clone());
            }
            for (name, field) in fields {
                let name = name.replace('~', "~0").replace('/', "~1");
                find_unions(field, format!("{pointer}/{name}"), places);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                find_unions(item, format!("{pointer}/{index}"), places);
            }
        }
        _ => {}
    }
}

/// A property that has another constant in each alternative of the `oneOf` at `place`, and the JSON pointers
/// of the alternatives.
fn tagged_alternatives(schema: &Value, place: &str) -> Option<(String, Vec<String>)> {
    let union = schema.pointer(place)?;
    let count = union.get("oneOf")?.as_array()?.len();
    let mut alternatives = Vec::with_capacity(count);
    for index in 0..count {
        alternatives.push(resolve(schema, format!("{place}/oneOf/{index}"))?);
    }
    let objects: Vec<&Map<String, Value>> =
        alternatives.iter().map(|pointer| schema.pointer(pointer)?.as_object()).collect::<Option<_>>()?;
    let tag = objects.first()?.get("properties")?.as_object()?.keys().find(|tag| {
        let mut seen: Vec<&Value> = Vec::new();
        objects.iter().all(|object| {
            let Some(constants) = constants(object, tag) else { return false };
            let is_new = constants.iter().all(|constant| !seen.contains(constant));
            seen.extend(constants);
            is_new
        })
    })?;
    Some((tag.clone(), alternatives))
}

/// The strings that the property `tag` of an object may be; None if it may be anything else.
fn constants<'a>(object: &'a Map<String, Value>, tag: &str) -> Option<Vec<&'a Value>> {
    if object.get("type")? != "object" {
        return None;
    }
    let property = object.get("properties")?.get(tag)?;
    let constants = match (property.get("const"), property.get("enum")) {
        (Some(constant), _) => vec![constant],
        (None, Some(constants)) => constants.as_array()?.iter().collect(),
        (None, None) => return None,
    };
    constants.iter().all(|constant| constant.is_string()).then_some(constants)
}

/// Where the schema at `pointer` is defined: it may be a `$ref` into the same document.
fn resolve(schema: &Value, mut pointer: String) -> Option<String> {
    // Longer chains are nobody's, and some have no end.
    for _ in 0..8 {
        let found = schema.pointer(&pointer)?;
        match found.get("$ref") {
            None => return Some(pointer),
            Some(reference) if found.as_object()?.len() == 1 => {
                pointer = reference.as_str()?.strip_prefix('#')?.to_owned();
            }
            Some(_) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_union_with_a_tag_becomes_any_of_and_needs_the_tag() {
        let tagged = |value: &str, required: &[&str]| {
            let properties = json!({"x": {}, "kind": {"const": value}});
            json!({"type": "object", "properties": properties, "required": required})
        };
        let schema = json!({
            "properties": {"pet": {"oneOf": [{"$ref": "#/$defs/a~1b"}, tagged("dog", &["x"])]}},
            "$defs": {"a/b": tagged("cat", &["kind"])},
        });
        let expected = json!({
            "properties": {"pet": {"anyOf": [{"$ref": "#/$defs/a~1b"}, tagged("dog", &["x", "kind"])]}},
            "$defs": {"a/b": tagged("cat", &["kind"])},
        });
        assert_eq!(distinguish(schema), expected);
    }

    #[test]
    fn other_unions_stay() {
        let object = |kind: Value| json!({"type": "object", "properties": {"kind": kind}});
        for one_of in [
            json!([object(json!({"const": "a"})), object(json!({"enum": ["b", "a"]}))]),
            json!([object(json!({"const": "a"})), object(json!({}))]),
            json!([object(json!({"const": 1})), object(json!({"const": 1.0}))]),
            json!([object(json!({"const": "a"})), {"properties": {"kind": {"const": "b"}}}]),
            json!([{"$ref": "#/oneOf/0"}]),
            json!([{"$ref": "other#/a"}]),
            json!([true, 3]),
            json!([]),
        ] {
            let schema = json!({"oneOf": one_of});
            assert_eq!(distinguish(schema.clone()), schema);
        }
    }
}

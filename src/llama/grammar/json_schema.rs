//! What is changed in a JSON schema before it is compiled.

use serde_json::{Map, Number, Value, json};
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
    let mut schema = Value::Object(schema);
    check(&mut schema)?;
    let mut schema = distinguish(schema);
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

/// Refuses what llguidance would not keep exactly, and takes out formats that every text has.
fn check(schema: &mut Value) -> std::result::Result<(), String> {
    let fields = match schema {
        Value::Object(fields) => fields,
        Value::Array(items) => return items.iter_mut().try_for_each(check),
        _ => return Ok(()),
    };
    if fields.get("format").and_then(Value::as_str).is_some_and(|format| FORMATS_OF_ANY.contains(&format)) {
        fields.remove("format");
    }
    check_names(fields)?;
    for (keyword, field) in fields {
        match keyword.as_str() {
            "const" | "enum" => check_numbers(field)?,
            "minimum" | "exclusiveMinimum" => narrow(field, true),
            "maximum" | "exclusiveMaximum" => narrow(field, false),
            // These are no schemas, or have schemas under names of their own.
            "default" | "example" | "examples" => {}
            "properties" | "patternProperties" | "$defs" | "definitions" => {
                if let Value::Object(schemas) = field {
                    schemas.values_mut().try_for_each(check)?;
                }
            }
            _ => check(field)?,
        }
    }
    Ok(())
}

/// Formats that do not say which texts are valid.
const FORMATS_OF_ANY: [&str; 3] = ["binary", "password", "path"];

/// llguidance computes with f64, so larger integers would become others.
const MAX_INTEGER: u64 = 1 << 53;

/// The integer that a number is. None if it is a fraction, or has more than 64 bits.
fn integer(number: &Number) -> Option<i128> {
    number.as_i64().map(i128::from).or(number.as_u64().map(i128::from))
}

fn check_numbers(value: &Value) -> std::result::Result<(), String> {
    let is_beyond = |number: &Number| match integer(number) {
        Some(integer) => integer.unsigned_abs() > u128::from(MAX_INTEGER),
        None => number.as_f64().is_some_and(|float| float.abs() > MAX_INTEGER as f64),
    };
    match value {
        Value::Number(number) if is_beyond(number) => {
            Err(format!("{number} is a number beyond 2^53, which is not supported"))
        }
        Value::Array(items) => items.iter().try_for_each(check_numbers),
        Value::Object(fields) => fields.values().try_for_each(check_numbers),
        _ => Ok(()),
    }
}

/// Moves a bound that is no f64 to the next one inside. llguidance cannot negate the least i64.
fn narrow(bound: &mut Value, is_minimum: bool) {
    let Value::Number(number) = &*bound else { return };
    let (Some(integer), Some(float)) = (integer(number), number.as_f64()) else { return };
    let rounded = float as i128;
    if rounded == integer && integer != i128::from(i64::MIN) {
        return;
    }
    let moved = match is_minimum {
        true if rounded > integer => float,
        true => float.next_up(),
        false if rounded < integer => float,
        false => float.next_down(),
    };
    *bound = Number::from_i128(moved as i128).map_or_else(|| moved.into(), Value::Number);
}

/// Refuses `minProperties` where llguidance may reach it by writing a name twice. It writes the names in
/// `properties` once, others as often as it likes.
fn check_names(fields: &Map<String, Value>) -> std::result::Result<(), String> {
    let Some(least) = fields.get("minProperties").and_then(Value::as_u64) else { return Ok(()) };
    let is_closed = fields.get("additionalProperties") == Some(&Value::Bool(false));
    let has_patterns = fields.get("patternProperties").is_some_and(|patterns| *patterns != json!({}));
    let required = fields.get("required").and_then(Value::as_array).map_or(0, Vec::len) as u64;
    if least > required + 1 && (!is_closed || has_patterns) {
        return Err(format!(
            "minProperties {least} is not supported beside {required} required properties, because other \
             names may repeat"
        ));
    }
    Ok(())
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

/// Makes `anyOf` of each `oneOf` whose alternatives exclude each other by their types, their constants or a
/// property: exactly one is valid then if any is. Pydantic writes unions with a discriminator in this way.
/// llguidance refuses a `oneOf` unless it sees that the alternatives exclude each other, and it does not look
/// behind `$ref`.
fn distinguish(mut schema: Value) -> Value {
    let mut places = Vec::new();
    find_unions(&schema, String::new(), &mut places);
    for place in places {
        let Some(alternatives) = alternatives(&schema, &place) else { continue };
        let Some(objects) = objects(&schema, &alternatives) else { continue };
        if !differ(&objects, types) && !differ(&objects, constants) {
            let Some(tag) = tag(&objects) else { continue };
            for alternative in alternatives {
                let Some(Value::Object(object)) = schema.pointer_mut(&alternative) else { continue };
                let required = object.entry("required").or_insert_with(|| json!([]));
                if let Value::Array(names) = required
                    && !names.iter().any(|name| *name == tag)
                {
                    names.push(tag.as_str().into());
                }
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

/// Where the alternatives of the `oneOf` at `place` are defined.
fn alternatives(schema: &Value, place: &str) -> Option<Vec<String>> {
    let count = schema.pointer(place)?.get("oneOf")?.as_array()?.len();
    (0..count).map(|index| resolve(schema, format!("{place}/oneOf/{index}"))).collect()
}

/// What is at some JSON pointers, if these are objects.
fn objects<'a>(schema: &'a Value, pointers: &[String]) -> Option<Vec<&'a Map<String, Value>>> {
    pointers.iter().map(|pointer| schema.pointer(pointer)?.as_object()).collect()
}

/// Whether `find` finds something in each schema, and nothing in two of them.
fn differ<T: PartialEq>(
    schemas: &[&Map<String, Value>],
    find: impl Fn(&Map<String, Value>) -> Option<Vec<T>>,
) -> bool {
    let mut seen = Vec::new();
    !schemas.is_empty()
        && schemas.iter().all(|schema| {
            let Some(found) = find(schema) else { return false };
            let is_new = found.iter().all(|one| !seen.contains(one));
            seen.extend(found);
            is_new
        })
}

/// The types of a schema's values.
fn types(schema: &Map<String, Value>) -> Option<Vec<String>> {
    let types = match schema.get("type")? {
        Value::Array(types) => types.clone(),
        one => vec![one.clone()],
    };
    // An integer is a number too.
    let name = |kind: &Value| Some(if kind == "integer" { "number" } else { kind.as_str()? }.to_owned());
    types.iter().map(name).collect()
}

/// The values that a schema names; None if it names none, or a number that can be written in two ways.
fn constants(schema: &Map<String, Value>) -> Option<Vec<Value>> {
    let constants = match (schema.get("const"), schema.get("enum")) {
        (Some(constant), _) => vec![constant.clone()],
        (None, Some(constants)) => constants.as_array()?.clone(),
        (None, None) => return None,
    };
    let is_plain = |value: &Value| value.is_string() || value.is_i64() || value.is_boolean();
    constants.iter().all(is_plain).then_some(constants)
}

/// A property that has other constants in each object.
fn tag(objects: &[&Map<String, Value>]) -> Option<String> {
    let property = |object: &Map<String, Value>, tag: &str| {
        let property = object.get("properties")?.get(tag)?.as_object()?;
        constants(property).filter(|_| object.get("type").is_some_and(|kind| kind == "object"))
    };
    let mut tags = objects.first()?.get("properties")?.as_object()?.keys();
    tags.find(|tag| differ(objects, |object| property(object, tag))).cloned()
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
    fn a_union_of_types_or_constants_becomes_any_of() {
        let defs = json!({"leaf": {"type": "object"}});
        for alternatives in [
            json!([{"type": "null"}, {"$ref": "#/$defs/leaf"}]),
            json!([{"type": ["integer", "null"]}, {"type": "string"}]),
            json!([{"const": 1, "title": "One"}, {"enum": [2, true, "a"]}]),
        ] {
            let schema = json!({"oneOf": alternatives, "$defs": defs});
            assert_eq!(distinguish(schema), json!({"anyOf": alternatives, "$defs": defs}));
        }
    }

    #[test]
    fn a_tag_may_be_a_number() {
        let tagged = |value: Value| {
            let properties = json!({"version": {"const": value}});
            json!({"type": "object", "properties": properties, "required": ["version"]})
        };
        let alternatives = json!([tagged(json!(1)), tagged(json!(2)), tagged(json!(false))]);
        assert_eq!(distinguish(json!({"oneOf": alternatives})), json!({"anyOf": alternatives}));
    }

    #[test]
    fn numbers_and_names_are_checked_where_they_are_keywords() {
        let big = (1_i64 << 53) + 1;
        for (schema, error) in [
            (json!({"const": big}), "2^53"),
            (json!({"items": {"enum": [{"id": [-big]}]}}), "2^53"),
            (json!({"properties": {"enum": {"const": big}}}), "2^53"),
            (json!({"const": 1e300}), "2^53"),
            (json!({"minProperties": 2}), "minProperties"),
            (
                json!({"minProperties": 2, "additionalProperties": false, "patternProperties": {"a": {}}}),
                "repeat",
            ),
            (json!({"anyOf": [{"minProperties": 3, "required": ["a"]}]}), "minProperties 3"),
        ] {
            let message = check(&mut schema.clone()).expect_err("the schema is refused");
            assert!(message.contains(error), "{message}");
        }
        for schema in [
            json!({"const": big - 1}),
            json!({"properties": {"const": {"default": big}}, "examples": [{"const": big}]}),
            json!({"maximum": 1e300}),
            json!({"minProperties": 2, "required": ["a"]}),
            json!({"minProperties": 2, "properties": {"a": {}, "b": {}}, "additionalProperties": false}),
        ] {
            assert_eq!(check(&mut schema.clone()), Ok(()), "{schema}");
        }
    }

    #[test]
    fn bounds_that_are_no_f64_move_inside() {
        let odd = (1_i64 << 53) + 1;
        for (schema, expected) in [
            (json!({"minimum": odd, "maximum": odd + 2}), json!({"minimum": odd + 1, "maximum": odd + 1})),
            (json!({"exclusiveMaximum": odd}), json!({"exclusiveMaximum": odd - 1})),
            (json!({"maximum": i64::MAX}), json!({"maximum": i64::MAX - 1023})),
            (json!({"minimum": i64::MIN}), json!({"minimum": i64::MIN + 1024})),
            (json!({"maximum": u64::MAX}), json!({"maximum": u64::MAX - 2047})),
            (json!({"minimum": -odd, "maximum": 9}), json!({"minimum": 1 - odd, "maximum": 9})),
        ] {
            let mut checked = schema;
            check(&mut checked).expect("the schema is supported");
            assert_eq!(checked, expected);
        }
    }

    #[test]
    fn formats_of_any_text_are_taken_out() {
        let mut schema = json!({"properties": {"format": {"type": "string", "format": "password"}}});
        check(&mut schema).expect("the schema is supported");
        assert_eq!(schema, json!({"properties": {"format": {"type": "string"}}}));
    }

    #[test]
    fn other_unions_stay() {
        let object = |kind: Value| json!({"type": "object", "properties": {"kind": kind}});
        for one_of in [
            json!([object(json!({"const": "a"})), object(json!({"enum": ["b", "a"]}))]),
            json!([object(json!({"const": "a"})), object(json!({}))]),
            json!([object(json!({"const": 1})), object(json!({"const": 1.0}))]),
            json!([{"type": "integer"}, {"type": "number"}]),
            json!([{"const": 1}, {"const": 1}]),
            json!([{"const": null}, {"type": "null"}]),
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

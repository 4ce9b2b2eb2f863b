//! Tests of the GGUF writer: the reader reads back what it wrote, and an unfinished file never gets its name.

use candle_llama::checkpoint::gguf::{Array, TensorSpec, Value, Writer, read_metadata};
use candle_llama::checkpoint::{Checkpoint, names};
use candle_llama::error::Error;
use candle_llama::kernels::WeightType;
use candle_llama::model::Cancel;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::checkpoint_files::{HEADS, KV_HEADS};

fn metadata() -> Vec<(String, Value)> {
    let values = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.attention.head_count", Value::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
        ("a.u8", Value::U8(200)),
        ("a.i8", Value::I8(-100)),
        ("a.u16", Value::U16(60_000)),
        ("a.i16", Value::I16(-30_000)),
        ("a.i32", Value::I32(-2_000_000_000)),
        ("a.f32", Value::F32(0.1)),
        ("a.bool", Value::Bool(true)),
        ("a.string", Value::String("é\n😀".into())),
        ("a.u64", Value::U64(u64::MAX)),
        ("a.i64", Value::I64(i64::MIN)),
        ("a.f64", Value::F64(-1e300)),
        ("b.u8", Value::Array(Array::U8(vec![1, 255]))),
        ("b.i8", Value::Array(Array::I8(vec![-1, 2]))),
        ("b.u16", Value::Array(Array::U16(vec![1, 65_535]))),
        ("b.i16", Value::Array(Array::I16(vec![-1]))),
        ("b.u32", Value::Array(Array::U32(vec![1, u32::MAX]))),
        ("b.i32", Value::Array(Array::I32(vec![i32::MIN]))),
        ("b.f32", Value::Array(Array::F32(vec![1.5, -0.0]))),
        ("b.bool", Value::Array(Array::Bool(vec![true, false]))),
        ("b.string", Value::Array(Array::String(vec![String::new(), "two".into()]))),
        ("b.empty", Value::Array(Array::String(Vec::new()))),
        ("b.u64", Value::Array(Array::U64(vec![u64::MAX]))),
        ("b.i64", Value::Array(Array::I64(vec![-1]))),
        ("b.f64", Value::Array(Array::F64(vec![0.1]))),
    ];
    values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn spec(name: &str, shape: &[usize], dtype: WeightType) -> TensorSpec {
    TensorSpec { name: name.into(), shape: shape.into(), dtype }
}

pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn values_and_tensors_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let specs = [
        spec("token_embd.weight", &[3, 32], WeightType::Q8_0),
        spec("output_norm.weight", &[5], WeightType::F32),
        spec("blk.0.attn_v.weight", &[7, 3], WeightType::F16),
    ];
    let data: Vec<Vec<u8>> = vec![
        (0..3 * 34).map(|i| i as u8).collect(),
        (0..5_u8).flat_map(|i| f32::from(i).to_le_bytes()).collect(),
        (0..42).collect(),
    ];
    let mut writer = Writer::create(&path, false, &metadata(), &specs).unwrap();
    for (spec, data) in specs.iter().zip(&data) {
        assert_eq!(spec.bytes(), Some(data.len() as u64));
        for piece in data.chunks(11) {
            writer.write(piece).unwrap();
        }
    }
    assert!(!path.exists());
    let bytes = writer.finish(&Cancel::never()).unwrap();
    assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
    assert!(bytes.is_multiple_of(32));
    assert_eq!(names_in(dir.path()), ["out.gguf"]);

    let read = read_metadata(&path).unwrap();
    let mut expected = metadata();
    expected.sort_by(|one, other| one.0.cmp(&other.0));
    let got: Vec<_> = read.iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
    assert_eq!(got, expected);
    let checkpoint = Checkpoint::open(&path).unwrap();
    for (spec, data) in specs.iter().zip(&data) {
        let tensor = checkpoint.tensor(&names::gguf_to_hf(&spec.name).unwrap()).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape(), tensor.bytes()), (spec.dtype, &*spec.shape, &**data));
    }
}

#[test]
fn an_unfinished_file_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let specs = [spec("output_norm.weight", &[4], WeightType::F32)];
    let begin = |force| Writer::create(&path, force, &metadata(), &specs);

    let mut writer = begin(false).unwrap();
    assert_eq!(names_in(dir.path()).len(), 1);
    assert!(matches!(writer.write(&[0; 17]), Err(Error::Internal { .. })));
    writer.write(&[0; 15]).unwrap();
    assert!(matches!(writer.finish(&Cancel::never()), Err(Error::Internal { .. })));
    assert_eq!(names_in(dir.path()), [""; 0]);

    let mut writer = begin(false).unwrap();
    writer.write(&[0; 16]).unwrap();
    assert!(matches!(writer.write(&[0]), Err(Error::Internal { .. })));
    let cancelled = AtomicBool::new(true);
    assert!(matches!(writer.finish(&Cancel::new(&cancelled)), Err(Error::Cancelled)));
    assert_eq!(names_in(dir.path()), [""; 0]);

    // A destination that was created in the meantime is not replaced.
    let mut writer = begin(false).unwrap();
    writer.write(&[0; 16]).unwrap();
    std::fs::write(&path, "old").unwrap();
    assert!(matches!(writer.finish(&Cancel::never()), Err(Error::Exists { .. })));
    assert!(matches!(begin(false), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");

    let mut writer = begin(true).unwrap();
    writer.write(&[0; 16]).unwrap();
    writer.finish(&Cancel::never()).unwrap();
    assert_eq!(names_in(dir.path()), ["out.gguf"]);
    assert!(std::fs::read(&path).unwrap().starts_with(b"GGUF"));
}

#[test]
fn impossible_shapes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    for (shape, dtype) in [
        (vec![2, 31], WeightType::Q4_0),
        (vec![usize::MAX, 32], WeightType::F32),
        (vec![1, 1, 1, 1, 1], WeightType::F32),
    ] {
        let refused = Writer::create(&path, false, &metadata(), &[spec("a.weight", &shape, dtype)]);
        assert!(matches!(refused.err(), Some(Error::InvalidArgument { .. })), "{shape:?}");
    }
    assert_eq!(names_in(dir.path()), [""; 0]);
}

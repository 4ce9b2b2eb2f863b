//! Tests of reading safetensors and GGUF files: valid files are read unchanged, wrong ones give typed errors.

use std::path::{Path, PathBuf};

use candle_llama::checkpoint::{Checkpoint, Format, gguf, tied};
use candle_llama::error::{Error, Result};
use candle_llama::kernels::WeightType;
use safetensors::tensor::Dtype;
use tempfile::TempDir;

use crate::checkpoint_files::{
    Entry, Gguf, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, raw_safetensors, seeded, write_safetensors,
};

/// Opens a folder with one file, model.safetensors, that has these bytes.
fn open_bytes(bytes: &[u8]) -> Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path())
}

fn open_gguf(bytes: &[u8]) -> Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path)
}

/// The message of a Malformed error.
fn malformed<T>(result: Result<T>) -> String {
    match result {
        Err(error @ Error::Malformed { .. }) => error.to_string(),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("no error"),
    }
}

/// The key and value of an Unsupported error.
fn unsupported<T>(result: Result<T>) -> (String, String) {
    match result {
        Err(Error::Unsupported { key, value }) => (key, value),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("no error"),
    }
}

mod safetensors_files {
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    fn shard(dir: &Path, name: &str, tensors: &[&str]) {
        let entries: Vec<_> =
            tensors.iter().map(|tensor| Entry::f32(tensor, &[2], &seeded(tensor.len() as u64, 2))).collect();
        write_safetensors(&dir.join(name), &entries);
    }

    fn index(dir: &Path, weight_map: &str) {
        let text = format!("{{\"metadata\": {{}}, \"weight_map\": {weight_map}}}");
        std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
    }

    #[test]
    fn one_file_gives_its_tensors_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let f32 = Entry::f32("a", &[2, 3], &seeded(1, 6));
        let bf16 = Entry::bf16("b", &[4], &seeded(2, 4));
        let f16 =
            Entry { name: "c".into(), dtype: Dtype::F16, shape: vec![1, 2], bytes: vec![0, 60, 0, 192] };
        let entries = [f32, bf16, f16];
        write_safetensors(&dir.path().join("model.safetensors"), &entries);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.format(), Format::Safetensors);
        assert!(checkpoint.metadata().is_none());
        for (entry, dtype) in entries.iter().zip([WeightType::F32, WeightType::BF16, WeightType::F16]) {
            let tensor = checkpoint.tensor(&entry.name).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (dtype, &entry.shape[..]));
            assert_eq!(tensor.bytes(), entry.bytes);
        }
        assert_eq!(checkpoint.tensor("c").unwrap().to_f32(), [1.0, -2.0]);
        let infos = checkpoint.infos();
        let names: Vec<_> =
            infos.iter().map(|info| (info.name.as_str(), info.dtype.as_str(), info.bytes)).collect();
        assert_eq!(names, [("a", "F32", 24), ("b", "BF16", 8), ("c", "F16", 4)]);
        assert!(checkpoint.contains("a") && !checkpoint.contains("d"));
        assert!(matches!(checkpoint.tensor("d"), Err(Error::MissingTensor { tensor, .. }) if tensor == "d"));
        let Err(Error::TensorShape { got, expected, .. }) = checkpoint.tensor_with_shape("a", &[3, 2]) else {
            panic!("shape was accepted")
        };
        assert_eq!((got, expected), (vec![2, 3], vec![3, 2]));
    }

    #[test]
    fn data_may_begin_at_any_address() {
        for padding in 0..4 {
            let header = format!(
                r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}{}}}"#,
                " ".repeat(padding)
            );
            let checkpoint = open_bytes(&raw_safetensors(&header, &1.5f32.to_le_bytes())).unwrap();
            let tensor = checkpoint.tensor("a").unwrap();
            assert_eq!(tensor.to_f32(), [1.5]);
        }
    }

    #[test]
    fn shards_are_joined_by_the_index() {
        let dir = tempfile::tempdir().unwrap();
        shard(dir.path(), "one.safetensors", &["a", "bb", "unlisted"]);
        shard(dir.path(), "two.safetensors", &["bb", "ccc"]);
        index(dir.path(), r#"{"a": "one.safetensors", "bb": "two.safetensors", "ccc": "two.safetensors"}"#);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let names: Vec<_> = checkpoint.infos().into_iter().map(|info| info.name).collect();
        assert_eq!(names, ["a", "bb", "ccc", "unlisted"]);
        assert_eq!(checkpoint.tensor("ccc").unwrap().to_f32(), seeded(3, 2));
    }

    #[test]
    fn the_index_must_agree_with_the_shards() {
        let dir = tempfile::tempdir().unwrap();
        shard(dir.path(), "one.safetensors", &["a"]);
        index(dir.path(), r#"{"a": "one.safetensors", "b": "one.safetensors"}"#);
        // Only a tensor that is needed must be there.
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.notes().iter().any(|note| note.contains("\"b\"")));
        assert!(malformed(checkpoint.tensor("b")).contains("weight_map.b says \"one.safetensors\""));
        index(dir.path(), r#"{"a": "two.safetensors"}"#);
        match Checkpoint::open(dir.path()) {
            Err(Error::NotFound { path, .. }) => assert!(path.ends_with("two.safetensors")),
            other => panic!("{:?}", other.err()),
        }
        index(dir.path(), r#"{"a": 1}"#);
        assert!(malformed(Checkpoint::open(dir.path())).contains("weight_map.a is 1, expected a string"));
        std::fs::write(dir.path().join("model.safetensors.index.json"), "{}").unwrap();
        assert!(malformed(Checkpoint::open(dir.path())).contains("has no weight_map"));
    }

    #[test]
    fn shards_cannot_be_outside_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        shard(outer.path(), "outside.safetensors", &["a"]);
        let dir = outer.path().join("model");
        std::fs::create_dir(&dir).unwrap();
        let absolute = outer.path().join("outside.safetensors");
        for name in ["../outside.safetensors", "..", ".", "", "a\\b", "c:d", absolute.to_str().unwrap()] {
            index(&dir, &serde_json::json!({ "a": name }).to_string());
            assert!(malformed(Checkpoint::open(&dir)).contains("not a plain file name"), "{name}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_wherever_they_lead() {
        use std::os::unix::fs::symlink;
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("folder");
        std::fs::create_dir(&dir).unwrap();
        index(&dir, r#"{"a": "one.safetensors"}"#);
        let link = dir.join("one.safetensors");
        let relink = |target: &Path| {
            let _ = std::fs::remove_file(&link);
            symlink(target, &link).unwrap();
            Checkpoint::open(&dir)
        };
        shard(&dir, "other.safetensors", &["a"]);
        shard(outer.path(), "outside", &["a"]);
        for target in ["other.safetensors", "../outside"] {
            assert!(relink(Path::new(target)).unwrap().contains("a"), "{target}");
        }
        assert!(relink(&outer.path().join("outside")).unwrap().contains("a"));
        match relink(Path::new("nowhere")) {
            Err(Error::NotFound { path, .. }) => assert_eq!(path, link),
            other => panic!("{:?}", other.err()),
        }
    }

    #[test]
    fn an_index_may_name_a_tied_head_that_no_shard_has() {
        let dir = tempfile::tempdir().unwrap();
        let (embedding, head) = (tied::EMBED_TOKENS, tied::LM_HEAD);
        shard(dir.path(), "one.safetensors", &[embedding]);
        index(dir.path(), &format!(r#"{{"{embedding}": "one.safetensors", "{head}": "one.safetensors"}}"#));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let choice = tied::choose_head(&checkpoint, Some(true), true).unwrap();
        assert_eq!((choice.lm_head, choice.warning), (tied::LmHead::Tied, None));
        for flag in [None, Some(false)] {
            let reason = malformed(tied::choose_head(&checkpoint, flag, false));
            assert!(
                reason.contains("lm_head.weight says \"one.safetensors\", which has no such"),
                "{reason}"
            );
        }
        // The embedding may be the one that was left out.
        shard(dir.path(), "one.safetensors", &[head]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(tied::choose_head(&checkpoint, Some(true), true).unwrap().lm_head, tied::LmHead::Tied);
        assert!(malformed(tied::choose_head(&checkpoint, Some(false), false)).contains("no such tensor"));
    }

    #[test]
    fn a_tensor_in_two_shards_needs_the_index_to_choose() {
        let dir = tempfile::tempdir().unwrap();
        shard(dir.path(), "one.safetensors", &["a", "x"]);
        shard(dir.path(), "two.safetensors", &["b", "x"]);
        index(dir.path(), r#"{"a": "one.safetensors", "b": "two.safetensors"}"#);
        assert!(malformed(Checkpoint::open(dir.path())).contains("\"x\" is in two shards"));
    }

    #[test]
    fn one_file_of_another_name_is_loaded_and_several_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        shard(dir.path(), "weights.safetensors", &["a"]);
        assert!(Checkpoint::open(dir.path()).unwrap().contains("a"));
        shard(dir.path(), "more.safetensors", &["b"]);
        assert!(malformed(Checkpoint::open(dir.path())).contains("more.safetensors, weights.safetensors"));
    }

    #[test]
    fn pickles_are_refused_with_the_way_to_convert_them() {
        for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pth", "model.pt"] {
            let dir = folder(&[(name, b"x"), ("config.json", b"{}")]);
            let (key, value) = unsupported(Checkpoint::open(dir.path()));
            assert_eq!(key, name);
            assert!(value.contains("pickle") && value.contains("save_pretrained"), "{value}");
            assert_eq!(unsupported(Checkpoint::open(&dir.path().join(name))).0, name);
        }
        let dir = folder(&[("consolidated.00.pth", b"x")]);
        let (_, value) = unsupported(Checkpoint::open(dir.path()));
        assert!(value.contains("convert_llama_weights_to_hf.py"), "{value}");
        // If there are safetensors files too, pickles are ignored.
        shard(dir.path(), "model.safetensors", &["a"]);
        assert!(Checkpoint::open(dir.path()).is_ok());
    }

    #[test]
    fn errors_name_what_a_folder_contains_instead() {
        let dir = folder(&[("adapter_model.safetensors", b"x")]);
        assert!(unsupported(Checkpoint::open(dir.path())).1.contains("LoRA"));
        let dir = folder(&[("consolidated.safetensors", b"x")]);
        assert!(unsupported(Checkpoint::open(dir.path())).1.contains("transformers version"));
        let not_found = |dir: &Path| match Checkpoint::open(dir) {
            Err(error @ Error::NotFound { .. }) => error.to_string(),
            other => panic!("{:?}", other.err()),
        };
        let dir = folder(&[("training_args.bin", b"x")]);
        assert!(
            not_found(dir.path()).contains("model.safetensors or model.safetensors.index.json not found")
        );
        let dir = folder(&[("x.gguf", b"x")]);
        assert!(not_found(dir.path()).contains("give the path of that file"));
        assert!(not_found(&dir.path().join("none")).contains("none"));
        let dir = folder(&[("model.safetensors", b"x")]);
        let file = Checkpoint::open(&dir.path().join("model.safetensors"));
        assert!(matches!(file, Err(Error::InvalidArgument { .. })));
    }

    #[test]
    fn every_truncation_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write_safetensors(&path, &[Entry::f32("a", &[3], &[1.0; 3]), Entry::bf16("b", &[2], &[1.0; 2])]);
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            match open_bytes(&whole[..len]) {
                Err(Error::Truncated { expected, got, .. }) => assert!(got == len as u64 && expected > got),
                other => panic!("{len}: {:?}", other.err()),
            }
        }
        assert!(
            malformed(open_bytes(&[&whole[..], b"x"].concat())).contains("1 bytes after its last tensor")
        );
    }

    #[test]
    fn a_wrong_length_of_the_header_allocates_nothing() {
        for len in [1 << 20, 100_000_000] {
            let bytes = [&u64::to_le_bytes(len)[..], b"{}"].concat();
            assert!(
                matches!(open_bytes(&bytes), Err(Error::Truncated { expected, .. }) if expected == len + 8)
            );
        }
        for len in [100_000_001, u64::MAX] {
            let bytes = [&u64::to_le_bytes(len)[..], b"{}"].concat();
            assert!(malformed(open_bytes(&bytes)).contains("the limit is 100000000"));
        }
    }

    #[test]
    fn wrong_headers_are_malformed() {
        let entry = |text: &str| format!("{{\"a\":{text}}}");
        let valid = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        for (header, reason) in [
            ("[]".into(), "header is not valid"),
            ("{".into(), "header is not valid"),
            (entry("1"), "header is not valid"),
            (entry(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#), "header is not valid"),
            (entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#), "takes 8 bytes"),
            (entry(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#), "before it begins"),
            (entry(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}"#), "too large"),
            (
                entry(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}"#),
                "tensor \"a\": more than 8 dimensions",
            ),
            (format!(r#"{{"a":{valid},"a":{valid}}}"#), "duplicate tensor \"a\""),
            (format!(r#"{{"a":{valid},"b":{valid}}}"#), "overlap"),
            (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}"#.into(), "has a gap"),
            (
                entry(r#"{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}"#),
                "header is not valid",
            ),
            (entry(r#"{"dtype":"NEW","shape":[4294967296],"data_offsets":[0,4]}"#), "takes 536870912 bytes"),
            (entry(r#"{"dtype":"\u001b[2J","shape":[1],"data_offsets":[0,4]}"#), "is of the type"),
            (r#"{"a\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.into(), "a control character"),
            (format!(r#"{{"a":{}"#, "[".repeat(1 << 20)), "header is not valid"),
            (format!(r#"{{"__metadata__":{}"#, "[".repeat(1 << 20)), "header is not valid"),
            (entry(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}"#), "header is not valid"),
            (entry(r#"{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), "duplicate field"),
        ] {
            let message = malformed(open_bytes(&raw_safetensors(&header, &[0; 4])));
            assert!(message.contains(reason), "{header}: {message}");
        }
    }

    #[test]
    fn messages_do_not_repeat_long_headers() {
        let long = "x".repeat(1 << 20);
        for header in [
            format!(r#"{{"{long}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#),
            format!(r#"{{"a":{{"dtype":"{long}","shape":[1],"data_offsets":[0,4]}}}}"#),
            format!(r#"{{"a":{{"dtype":"F32","shape":"{long}","data_offsets":[0,4]}}}}"#),
            format!(r#"{{"a":{{"dtype":"F32","shape":[1{}],"data_offsets":[0,4]}}}}"#, ",1".repeat(1 << 20)),
            format!("\"{long}\""),
        ] {
            assert!(malformed(open_bytes(&raw_safetensors(&header, &[0; 4]))).len() < 600);
        }
    }

    #[test]
    fn more_tensors_than_any_model_has_are_refused() {
        let tensor = |i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
        let header = |tensors| format!("{{{}}}", (0..tensors).map(tensor).collect::<Vec<_>>().join(","));
        assert!(open_bytes(&raw_safetensors(&header(1 << 17), &[])).is_ok());
        let message = malformed(open_bytes(&raw_safetensors(&header((1 << 17) + 1), &[])));
        assert!(message.contains("more than 131072 tensors"), "{message}");
    }

    #[test]
    fn unsupported_types_are_listed_and_refused_when_read() {
        for (dtype, shape) in [("F8_E4M3", "[2,2]"), ("I32", "[1]"), ("F4", "[7]"), ("SOMETHING_NEW", "[7]")]
        {
            let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,4]}}}}"#);
            let checkpoint = open_bytes(&raw_safetensors(&header, &[0; 4])).unwrap();
            assert_eq!(checkpoint.infos()[0].dtype, dtype);
            match checkpoint.tensor("a") {
                Err(Error::TensorType { dtype: got, .. }) => assert_eq!(got, dtype),
                other => panic!("{:?}", other.err()),
            }
        }
    }

    #[test]
    fn empty_tensors_are_read() {
        let header = r#"{"a":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},
            "b":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
        let checkpoint = open_bytes(&raw_safetensors(header, &2f32.to_le_bytes())).unwrap();
        assert_eq!(checkpoint.tensor("a").unwrap().to_f32(), [0.0; 0]);
        assert_eq!(checkpoint.tensor("b").unwrap().to_f32(), [2.0]);
    }
}

mod gguf_files {
    use super::*;

    /// ggml's number of a type, and our type.
    const READABLE: [(u32, WeightType); 6] = [
        (0, WeightType::F32),
        (1, WeightType::F16),
        (2, WeightType::Q4_0),
        (3, WeightType::Q4_1),
        (8, WeightType::Q8_0),
        (30, WeightType::BF16),
    ];

    /// Bytes that differ from row to row. They are no sensible weights.
    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 % 251) as u8).collect()
    }

    #[test]
    fn all_six_types_are_read_in_place() {
        let mut file = Gguf::llama();
        for (kind, dtype) in READABLE {
            let bytes = pattern(dtype.bytes_for(3 * 64).unwrap());
            file = file.tensor(&format!("{dtype}"), &[3, 64], kind, &bytes);
        }
        for version in [2, 3] {
            file.version = version;
            let checkpoint = open_gguf(&file.bytes()).unwrap();
            assert_eq!(checkpoint.format(), Format::Gguf);
            for (_, dtype) in READABLE {
                let tensor = checkpoint.tensor(dtype.name()).unwrap();
                assert_eq!((tensor.dtype(), tensor.shape()), (dtype, &[3, 64][..]));
                assert_eq!(tensor.bytes(), pattern(dtype.bytes_for(3 * 64).unwrap()));
            }
        }
    }

    #[test]
    fn tensors_have_hugging_face_s_names() {
        let file = Gguf::llama()
            .tensor("token_embd.weight", &[2], 0, &[0; 8])
            .tensor("blk.1.attn_v.weight", &[2], 0, &[0; 8])
            .tensor("rope_freqs.weight", &[2], 0, &[0; 8]);
        let checkpoint = open_gguf(&file.bytes()).unwrap();
        let names: Vec<_> = checkpoint.infos().into_iter().map(|info| info.name).collect();
        assert_eq!(
            names,
            ["model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight", "rope_freqs.weight"]
        );
        let both = file.tensor("model.embed_tokens.weight", &[2], 0, &[0; 8]);
        assert!(malformed(open_gguf(&both.bytes())).contains("two tensors for"));
    }

    #[test]
    fn unsupported_types_are_listed_and_refused_by_name() {
        let file = Gguf::llama()
            .tensor("k", &[2, 256], 22, &[0; 164])
            .tensor("new", &[5], 99, &[0; 4])
            .tensor("i", &[3], 26, &[0; 12]);
        let checkpoint = open_gguf(&file.bytes()).unwrap();
        let infos: Vec<_> = checkpoint.infos().into_iter().map(|info| (info.dtype, info.bytes)).collect();
        assert_eq!(infos, [("I32".into(), 12), ("IQ2_S".into(), 164), ("ggml type 99".into(), 0)]);
        match checkpoint.tensor("k") {
            Err(error @ Error::TensorType { .. }) => assert!(error.to_string().contains("stored as IQ2_S")),
            other => panic!("{:?}", other.err()),
        }
        assert!(matches!(checkpoint.tensor("new"), Err(Error::TensorType { .. })));
    }

    /// Rows as llama.cpp's converter orders them: `(head, half, pair)` becomes `(head, pair, half)`.
    fn converter_permutes(rows: &[Vec<u8>], heads: usize) -> Vec<u8> {
        let head_dim = rows.len() / heads;
        let mut out = Vec::new();
        for head in rows.chunks(head_dim) {
            let (first, second) = head.split_at(head_dim / 2);
            for (one, other) in first.iter().zip(second) {
                out.extend(one);
                out.extend(other);
            }
        }
        out
    }

    #[test]
    fn the_permutation_of_q_and_k_is_undone_in_every_type() {
        for (kind, dtype) in READABLE {
            for (gguf, hf, heads) in [("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)] {
                let rows = heads * HEAD_DIM;
                let row_bytes = dtype.bytes_for(HIDDEN).unwrap();
                let original = pattern(rows * row_bytes);
                let in_rows: Vec<_> = original.chunks(row_bytes).map(<[u8]>::to_vec).collect();
                let permuted = converter_permutes(&in_rows, heads);
                assert_ne!(permuted, original);
                let file =
                    Gguf::llama().tensor(&format!("blk.0.{gguf}.weight"), &[rows, HIDDEN], kind, &permuted);
                let checkpoint = open_gguf(&file.bytes()).unwrap();
                let tensor = checkpoint.tensor(&format!("model.layers.0.self_attn.{hf}.weight")).unwrap();
                assert_eq!(tensor.bytes(), original, "{dtype} {hf}");
                assert_eq!(tensor.shape(), [rows, HIDDEN]);
            }
        }
    }

    #[test]
    fn the_permutation_of_a_bias_is_undone_and_values_stay_in_place() {
        let bias = seeded(1, HEADS * HEAD_DIM);
        let rows: Vec<_> = bias.iter().map(|value| value.to_le_bytes().to_vec()).collect();
        let file = Gguf::llama()
            .tensor("blk.0.attn_q.bias", &[bias.len()], 0, &converter_permutes(&rows, HEADS))
            .tensor("blk.0.attn_v.bias", &[bias.len()], 0, &rows.concat())
            .tensor("blk.1.attn_q.bias", &[32], 8, &[0; 34]);
        let checkpoint = open_gguf(&file.bytes()).unwrap();
        assert_eq!(checkpoint.tensor("model.layers.0.self_attn.q_proj.bias").unwrap().to_f32(), bias);
        assert_eq!(checkpoint.tensor("model.layers.0.self_attn.v_proj.bias").unwrap().to_f32(), bias);
        // The numbers of a quant block cannot be reordered.
        assert!(
            malformed(checkpoint.tensor("model.layers.1.self_attn.q_proj.bias"))
                .contains("span several rows")
        );
    }

    #[test]
    fn the_permutation_needs_heads_that_fit() {
        let q = |file: Gguf| {
            let file = file.tensor("blk.0.attn_q.weight", &[6, 2], 0, &[0; 48]);
            malformed(open_gguf(&file.bytes()).unwrap().tensor("model.layers.0.self_attn.q_proj.weight"))
        };
        let llama = || Gguf::empty().string("general.architecture", "llama");
        assert!(q(llama()).contains("has no llama.attention.head_count"));
        for heads in [0, 2, 4, u32::MAX] {
            assert!(
                q(llama().u32("llama.attention.head_count", heads)).contains("cannot be split"),
                "{heads}"
            );
        }
    }

    #[test]
    fn a_projection_without_dimensions_is_refused() {
        let file = Gguf::llama().tensor("blk.0.attn_q.weight", &[], 0, &[0; 4]);
        let checkpoint = open_gguf(&file.bytes()).unwrap();
        assert!(malformed(checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")).contains("no rows"));
    }

    #[test]
    fn heads_may_be_a_uniform_list() {
        let file = |kv: &[u32]| {
            Gguf::empty()
                .string("general.architecture", "llama")
                .u32("llama.attention.head_count", 4)
                .u32s("llama.attention.head_count_kv", kv)
                .tensor("blk.0.attn_k.weight", &[4, 1], 0, bytemuck::cast_slice(&[0f32, 2.0, 1.0, 3.0]))
        };
        let k = |kv: &[u32]| {
            open_gguf(&file(kv).bytes()).unwrap().tensor("model.layers.0.self_attn.k_proj.weight")
        };
        assert_eq!(k(&[1, 1]).unwrap().to_f32(), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(unsupported(k(&[1, 2])).0, "llama.attention.head_count_kv");
        assert_eq!(unsupported(k(&[])).0, "llama.attention.head_count_kv");
    }

    #[test]
    fn the_file_s_alignment_is_honoured() {
        let mut file = Gguf::llama().u32("general.alignment", 128);
        file.alignment = 128;
        let bytes = file.tensor("a", &[1], 0, &[1; 4]).tensor("b", &[1], 0, &[2; 4]).bytes();
        assert_eq!(open_gguf(&bytes).unwrap().tensor("b").unwrap().bytes(), [2; 4]);
        for wrong in [0, 3, 48, 1 << 21] {
            let file = Gguf::llama().u32("general.alignment", wrong).tensor("a", &[1], 0, &[0; 4]);
            assert!(malformed(open_gguf(&file.bytes())).contains("general.alignment"), "{wrong}");
        }
        let unaligned = Gguf::llama().tensor("a", &[8], 0, &[0; 32]).tensor_at("b", &[1], 0, 4);
        assert!(malformed(open_gguf(&unaligned.bytes())).contains("no multiple of 32"));
    }

    #[test]
    fn every_truncation_is_noticed() {
        let whole = Gguf::llama()
            .strings("tokenizer.ggml.tokens", &["a", "bc"])
            .u32s("x", &[1, 2])
            .tensor("a", &[2, 32], 2, &[0; 36])
            .bytes();
        assert!(open_gguf(&whole).is_ok());
        for len in 0..whole.len() {
            match open_gguf(&whole[..len]) {
                Err(Error::Truncated { expected, got, .. }) => assert!(got == len as u64 && expected > got),
                other => panic!("{len}: {:?}", other.err()),
            }
        }
    }

    #[test]
    fn other_versions_and_byte_orders_are_refused_by_name() {
        let with_version = |version| {
            let mut file = Gguf::llama();
            file.version = version;
            open_gguf(&file.bytes())
        };
        assert!(unsupported(with_version(1)).1.starts_with("1;"));
        assert!(unsupported(with_version(4)).1.starts_with("4;"));
        assert!(unsupported(with_version(3u32.swap_bytes())).1.starts_with("big-endian"));
        assert!(malformed(open_gguf(b"GGML\x03\x00\x00\x00")).contains("does not begin with \"GGUF\""));
    }

    #[test]
    fn other_architectures_are_refused_but_their_metadata_is_read() {
        let qwen = Gguf::empty().string("general.architecture", "qwen2").bytes();
        let (key, value) = unsupported(open_gguf(&qwen));
        assert_eq!(key, "general.architecture");
        assert!(value.contains("qwen2"));
        let path = write(&qwen);
        let metadata = gguf::read_metadata(&path.1).unwrap();
        assert_eq!(metadata.string("general.architecture").unwrap(), Some("qwen2"));
        assert!(malformed(open_gguf(&Gguf::empty().bytes())).contains("has no general.architecture"));
    }

    fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn metadata_has_typed_getters() {
        let file = Gguf::llama()
            .value("i8", 1, &[255])
            .value("u64", 10, &7u64.to_le_bytes())
            .value("f64", 12, &0.5f64.to_le_bytes())
            .value("bool", 7, &[1])
            .strings("strings", &["x", "é"])
            .array("ints", 5, 2, bytemuck::cast_slice(&[-1i32, 5]))
            .array("floats", 6, 1, &1.5f32.to_le_bytes());
        let (_dir, path) = write(&file.bytes());
        let metadata = gguf::read_metadata(&path).unwrap();
        assert_eq!(metadata.path(), path);
        assert_eq!(metadata.u64("u64").unwrap(), Some(7));
        assert_eq!(metadata.u64("llama.block_count").unwrap(), Some(2));
        assert_eq!(metadata.f64("f64").unwrap(), Some(0.5));
        assert_eq!(metadata.f64("llama.attention.layer_norm_rms_epsilon").unwrap(), Some(1e-5));
        assert_eq!(metadata.bool("bool").unwrap(), Some(true));
        assert_eq!(metadata.strings("strings").unwrap().unwrap(), ["x", "é"]);
        assert_eq!(metadata.ints("ints").unwrap(), Some(vec![-1, 5]));
        assert_eq!(metadata.floats("floats").unwrap(), Some(vec![1.5]));
        assert_eq!(metadata.get("i8"), Some(&gguf::Value::I8(-1)));
        assert_eq!(metadata.iter().count(), 16);
        assert_eq!(metadata.string("absent").unwrap(), None);
        assert!(
            malformed(metadata.u64("i8")).contains("i8 is an integer, expected an integer, zero or more")
        );
        assert!(malformed(metadata.string("bool")).contains("bool is a boolean, expected a string"));
        malformed(metadata.ints("floats"));
        malformed(metadata.f64("u64"));
    }

    #[test]
    fn wrong_files_give_typed_errors() {
        let huge = u64::MAX.to_le_bytes();
        for (what, file) in [
            ("array of arrays", Gguf::llama().array("x", 9, 1, &[0; 16])),
            ("unknown value type", Gguf::llama().value("x", 13, &[0; 8])),
            ("unknown element type", Gguf::llama().array("x", 13, 1, &[0; 8])),
            ("boolean of 2", Gguf::llama().value("x", 7, &[2])),
            ("invalid UTF-8", Gguf::llama().value("llama.x", 8, b"\x01\0\0\0\0\0\0\0\xff")),
            ("invalid UTF-8", Gguf::llama().value("tokenizer.x", 8, b"\x01\0\0\0\0\0\0\0\xff")),
            ("invalid UTF-8", Gguf::empty().value("general.architecture", 8, b"\x01\0\0\0\0\0\0\0\xff")),
            ("key twice", Gguf::llama().u32("x", 1).u32("x", 1)),
            ("tensor twice", Gguf::llama().tensor("x", &[1], 0, &[0; 4]).tensor("x", &[1], 0, &[0; 4])),
            ("five dimensions", Gguf::llama().tensor("x", &[1; 5], 0, &[0; 4])),
            ("half a block", Gguf::llama().tensor("x", &[2, 16], 2, &[0; 18])),
            ("overflowing shape", Gguf::llama().tensor("x", &[1 << 40, 1 << 40], 0, &[0; 4])),
            ("unknown type, huge shape", Gguf::llama().tensor("x", &[1 << 40], 99, &[0; 4])),
            ("overlap", Gguf::llama().tensor("x", &[16], 0, &[0; 64]).tensor_at("y", &[8], 0, 32)),
            ("long name", Gguf::llama().tensor(&"x".repeat(2000), &[1], 0, &[0; 4])),
            ("control character", Gguf::llama().u32("x\u{1b}[2J", 1)),
        ] {
            let message = malformed(open_gguf(&file.bytes()));
            assert!(message.contains("model.gguf"), "{what}: {message}");
        }
        for (what, file) in [
            ("string", Gguf::llama().value("x", 8, &huge)),
            ("strings", Gguf::llama().array("x", 8, u64::MAX, &[])),
            ("numbers", Gguf::llama().array("x", 10, u64::MAX / 8, &[])),
            ("booleans", Gguf::llama().array("x", 7, u64::MAX, &[])),
            ("data", Gguf::llama().tensor_at("x", &[1], 0, 1 << 40)),
            ("offset", Gguf::llama().tensor_at("x", &[8], 0, 1 << 63)),
        ] {
            let result = open_gguf(&file.bytes());
            assert!(matches!(result, Err(Error::Truncated { .. })), "{what}: {:?}", result.err());
        }
        for count in [1 << 63, 1 << 62, u64::MAX / 24] {
            let mut counts = Gguf::llama().bytes();
            counts[8..16].copy_from_slice(&u64::to_le_bytes(count));
            assert!(matches!(open_gguf(&counts), Err(Error::Truncated { .. })), "{count}");
        }
        let mut counts = Gguf::llama().bytes();
        counts[8..16].copy_from_slice(&huge);
        assert!(matches!(open_gguf(&counts), Err(Error::Truncated { .. })));
        let mut counts = Gguf::llama().bytes();
        counts[16..24].copy_from_slice(&huge);
        assert!(matches!(open_gguf(&counts), Err(Error::Truncated { .. })));
    }

    /// Reads the metadata of a sparse file of `file_len` bytes that ends in an array of `count` elements.
    fn array_of(kind: u32, count: u64, file_len: u64) -> Result<gguf::Metadata> {
        let array = Gguf::llama().array("x", kind, count, &[]);
        let (_dir, path) = write(&array.bytes());
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(file_len).unwrap();
        gguf::read_metadata(&path)
    }

    #[test]
    fn metadata_that_claims_the_whole_of_a_large_file_is_refused() {
        assert!(malformed(array_of(8, 1_000_000_000, 1 << 34)).contains("the limit is 4194304"));
        assert!(malformed(array_of(0, 1_000_000_000, 1 << 34)).contains("the limit is 4194304"));
        assert!(array_of(0, 1 << 22, 1 << 34).is_ok());
        let string = Gguf::llama().value("x", 8, &(1u64 << 30).to_le_bytes());
        let (_dir, path) = write(&string.bytes());
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 34).unwrap();
        assert!(malformed(gguf::read_metadata(&path)).contains("metadata of more than"));
        let mut values = Gguf::llama().bytes();
        values[16..24].copy_from_slice(&(1u64 << 20).to_le_bytes());
        let (_dir, path) = write(&values);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 34).unwrap();
        assert!(malformed(gguf::read_metadata(&path)).contains("1048576 metadata values, the limit"));
    }
}

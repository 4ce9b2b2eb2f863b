//! A forward pass of several sequences gives each row the bits that it has in a pass of its sequence alone.
//! With the tensor engine it gives the same numbers but for rounding.

use candle_llama::checkpoint::Checkpoint;
use candle_llama::checkpoint::tied::LmHead;
use candle_llama::config::LlamaConfig;
use candle_llama::error::Error;
use candle_llama::kernels::{Isa, WeightType};
use candle_llama::llama::{QuantizeOptions, quantize};
use candle_llama::model::cpu::{CpuModel, CpuOptions, Types};
use candle_llama::model::tensor::{Matrices, TensorModel, TensorOptions};
use candle_llama::model::{Beginning, Cancel, Model, Rows, SeqId, Span};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

use crate::checkpoint_files::{Entry, HEADS, VOCAB, llama_config, llama_weights_with, write_safetensors};

/// K types have blocks of 256.
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 512;

/// The weights of a Llama whose activations have outliers, for which a long prompt keeps residuals.
fn folder() -> TempDir {
    folder_with_outliers(100.0)
}

/// A Llama with some activations that are so many times as large as others.
fn folder_with_outliers(factor: f32) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut weights = llama_weights_with(HIDDEN, INTERMEDIATE, HIDDEN / HEADS);
    weights[0].2.iter_mut().step_by(3 * HIDDEN + 5).for_each(|number| *number *= factor);
    let entries: Vec<_> =
        weights.iter().map(|(name, shape, values)| Entry::f32(name, shape, values)).collect();
    write_safetensors(&dir.path().join("model.safetensors"), &entries);
    let mut config = llama_config();
    config["hidden_size"] = HIDDEN.into();
    config["intermediate_size"] = INTERMEDIATE.into();
    config["max_position_embeddings"] = 1024.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// A Llama with its matrices in this type.
fn load(dir: &TempDir, dtype: WeightType, isa: Isa, exact: bool) -> CpuModel {
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let types = if dtype.block_len() == 1 {
        Types { dtype: Some(dtype), ..Types::default() }
    } else {
        let names = checkpoint.infos().into_iter().filter(|info| info.shape.len() == 2);
        Types { quantize: names.map(|info| (info.name, dtype)).collect(), ..Types::default() }
    };
    let kv_dtype = if exact { WeightType::F32 } else { WeightType::F16 };
    let lm_head = LmHead::Tied;
    let options = CpuOptions {
        isa,
        threads: 2,
        lm_head,
        types,
        exact,
        kv_dtype,
        kv_bytes: 64 << 20,
        prefix_cache: false,
        cached_kv_bytes: 0,
    };
    let config = LlamaConfig::from_folder(dir.path()).unwrap();
    CpuModel::new(config, &checkpoint, &options, &Cancel::never()).unwrap()
}

/// A sequence: the tokens before the pass, those of the pass, and one after it.
struct Sequence {
    tokens: Vec<u32>,
    prompt: usize,
    pass: std::ops::Range<usize>,
    rows: Rows,
}

/// A sequence whose tokens `pass` are in the pass.
fn sequence(seed: usize, prompt: usize, pass: std::ops::Range<usize>, rows: Rows) -> Sequence {
    let tokens = (0..=pass.end).map(|at| ((at * 7 + at * at * seed + seed) % VOCAB) as u32).collect();
    Sequence { tokens, prompt, pass, rows }
}

/// Sequences of every part of a sequence that has kernels of its own.
fn sequences() -> Vec<Sequence> {
    vec![
        // Generated tokens, after a long prompt and after a short one.
        sequence(1, 150, 150..151, Rows::Last),
        sequence(2, 5, 9..10, Rows::Last),
        // A long prompt's middle and another's end.
        sequence(3, 400, 64..112, Rows::All),
        sequence(4, 140, 107..140, Rows::All),
        // A phrase, a short prompt, and a generated token after them.
        sequence(5, 7, 0..7, Rows::Last),
        sequence(6, 40, 0..40, Rows::All),
        sequence(7, 20, 20..21, Rows::Last),
        // A span that begins in the prompt.
        sequence(8, 131, 125..140, Rows::All),
        sequence(9, 300, 0..30, Rows::None),
    ]
}

fn bits(model: &mut dyn Model, spans: &[Span]) -> Vec<u32> {
    let logits = model.forward(spans, &Cancel::never()).unwrap();
    logits.values.into_iter().map(f32::to_bits).collect()
}

/// The same of a pass that has paused `stages` times already, and does so wherever it can, with `beside` in
/// each pause.
fn bits_with_pauses_after(
    model: &mut dyn Model,
    spans: &[Span],
    stages: usize,
    mut beside: impl FnMut(&mut dyn Model),
) -> Vec<u32> {
    for stage in stages + 1.. {
        let logits = model.forward_until(spans, &mut || true, &Cancel::never()).unwrap();
        if let Some(logits) = logits {
            assert_eq!(stage, model.stages());
            return logits.values.into_iter().map(f32::to_bits).collect();
        }
        beside(model);
    }
    unreachable!("the loop has no end")
}

/// Runs the sequences in passes of at most `together` of them, and returns the logits: those of the passes,
/// then those of the next tokens.
fn run(
    model: &mut dyn Model,
    sequences: &[Sequence],
    order: &[usize],
    together: usize,
) -> [Vec<Vec<u32>>; 2] {
    for &index in order {
        let Sequence { tokens, prompt, pass, .. } = &sequences[index];
        let seq = SeqId(index as u64);
        model.free(seq);
        let beginning = Beginning { tokens, prompt_tokens: *prompt, reusable: 0, salt: "" };
        model.begin(seq, &beginning);
        if pass.start > 0 {
            let span = Span { seq, tokens: &tokens[..pass.start], start: 0, rows: Rows::None };
            model.forward(&[span], &Cancel::never()).unwrap();
        }
    }
    let mut run_passes = |next: bool| {
        let mut logits = vec![Vec::new(); sequences.len()];
        for pass in order.chunks(together) {
            let spans: Vec<Span> = pass
                .iter()
                .map(|&index| {
                    let Sequence { tokens, pass, rows, .. } = &sequences[index];
                    let (pass, rows) =
                        if next { (pass.end..pass.end + 1, Rows::All) } else { (pass.clone(), *rows) };
                    Span { seq: SeqId(index as u64), tokens: &tokens[pass.clone()], start: pass.start, rows }
                })
                .collect();
            let all = bits(model, &spans);
            let mut later = &all[..];
            for (&index, span) in pass.iter().zip(&spans) {
                let rows = match span.rows {
                    Rows::None => 0,
                    Rows::Last => 1,
                    Rows::All => span.tokens.len(),
                };
                let (own, rest) = later.split_at(rows * VOCAB);
                (logits[index], later) = (own.to_vec(), rest);
            }
            assert!(later.is_empty());
        }
        logits
    };
    [run_passes(false), run_passes(true)]
}

#[test]
fn a_row_does_not_depend_on_the_other_sequences_of_a_pass() {
    use WeightType::{BF16, F16, F32, Q4_0, Q4_K, Q6_K, Q8_0};
    let dir = folder();
    let sequences = sequences();
    let in_order: Vec<usize> = (0..sequences.len()).collect();
    // Spans of one kind after each other, or in turns.
    let orders = [in_order.clone(), vec![8, 3, 0, 5, 1, 4, 2, 6, 7], vec![2, 0], vec![4, 1, 6]];
    for isa in Isa::available() {
        for dtype in [Q4_0, Q8_0, Q4_K, Q6_K, BF16, F16, F32] {
            for exact in [false, true] {
                let mut model = load(&dir, dtype, isa, exact);
                let alone = run(&mut model, &sequences, &in_order, 1);
                assert!(alone[0][2].iter().all(|&bits| f32::from_bits(bits).is_finite()));
                for order in &orders {
                    let together = run(&mut model, &sequences, order, order.len());
                    for &index in order {
                        let place =
                            format!("{dtype} exact: {exact}, sequence {index} of {order:?}, {}", isa.name());
                        assert!(together[0][index] == alone[0][index], "{place}");
                        assert!(together[1][index] == alone[1][index], "the next token: {place}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_pass_without_spans_has_no_logits() {
    let mut model = load(&folder(), WeightType::Q4_K, Isa::detect().unwrap(), false);
    assert!(bits(&mut model, &[]).is_empty());
    let logits = model.forward_until(&[], &mut || true, &Cancel::never()).unwrap();
    assert_eq!(logits.map(|logits| logits.rows()), Some(0));
}

#[test]
fn a_row_does_not_depend_on_the_pauses_of_its_pass() {
    use WeightType::{BF16, Q4_K};
    let dir = folder();
    let sequences = sequences();
    let in_order: Vec<usize> = (0..sequences.len()).collect();
    let other: Vec<u32> = (0..300).map(|at| at % 97).collect();
    for dtype in [Q4_K, BF16] {
        for exact in [false, true] {
            let mut model = load(&dir, dtype, Isa::detect().unwrap(), exact);
            let alone = run(&mut model, &sequences, &in_order, 1);
            for &index in &in_order {
                let Sequence { tokens, prompt, pass, rows } = &sequences[index];
                let begin = |model: &mut dyn Model, seq: SeqId| {
                    model.free(seq);
                    model.begin(seq, &Beginning { tokens, prompt_tokens: *prompt, reusable: 0, salt: "" });
                    if pass.start > 0 {
                        let span = Span { seq, tokens: &tokens[..pass.start], start: 0, rows: Rows::None };
                        model.forward(&[span], &Cancel::never()).unwrap();
                    }
                    Span { seq, tokens: &tokens[pass.clone()], start: pass.start, rows: *rows }
                };
                let spans = [7, 8, 9].map(|seq| begin(&mut model, SeqId(100 + seq)));
                let mut start = 0;
                // The first sequence leaves the pass, then the last.
                let mut left = spans.to_vec();
                for gone in [0, 1] {
                    let paused = model.forward_until(&left, &mut || true, &Cancel::never()).unwrap();
                    assert_eq!(paused, None);
                    model.free(left.remove(gone).seq);
                }
                let own = bits_with_pauses_after(&mut model, &left, 2, |model| {
                    let tokens = &other[start..start + 3];
                    let span = Span { seq: SeqId(999), tokens, start, rows: Rows::Last };
                    model.forward(&[span], &Cancel::never()).unwrap();
                    start += 3;
                });
                assert!(own == alone[0][index], "{dtype} exact: {exact}, sequence {index}");
                model.free(SeqId(999));
            }
        }
    }
}

#[test]
fn a_paused_pass_does_not_go_on_with_other_spans() {
    let mut model = load(&folder(), WeightType::Q4_K, Isa::detect().unwrap(), false);
    let tokens: Vec<u32> = (0..40).collect();
    let span = |seq, len, rows| Span { seq: SeqId(seq), tokens: &tokens[..len], start: 0, rows };
    let begin = |model: &mut dyn Model| {
        for seq in [SeqId(1), SeqId(2)] {
            model.free(seq);
            model.begin(seq, &Beginning { tokens: &tokens, prompt_tokens: 40, reusable: 0, salt: "" });
        }
    };
    let paused = span(1, 30, Rows::Last);
    // Another sequence, more tokens, more rows of logits, one sequence more, none.
    let second = span(2, 30, Rows::Last);
    let others =
        [vec![second], vec![span(1, 40, Rows::Last)], vec![span(1, 30, Rows::All)], vec![paused, second]];
    for spans in others.into_iter().chain([Vec::new()]) {
        begin(&mut model);
        let expected = bits(&mut model, &spans);
        begin(&mut model);
        assert_eq!(model.forward_until(&[paused], &mut || true, &Cancel::never()).unwrap(), None);
        let logits = model.forward_until(&spans, &mut || false, &Cancel::never()).unwrap().unwrap();
        assert!(logits.values.into_iter().map(f32::to_bits).eq(expected), "{} spans", spans.len());
    }
}

/// The same Llama in Candle's tensors, on the CPU, with room for `max_seqs` sequences.
fn load_tensors(path: &Path, max_seqs: usize, matrices: Matrices) -> TensorModel {
    let options = TensorOptions {
        device: candle_core::Device::Cpu,
        dtype: candle_core::DType::F32,
        matrices,
        lm_head: LmHead::Tied,
        context_length: 1024,
        max_seqs,
    };
    let checkpoint = Checkpoint::open(path).unwrap();
    let config = match checkpoint.metadata() {
        Some(metadata) => LlamaConfig::from_gguf(metadata, Some(&checkpoint)).unwrap(),
        None => LlamaConfig::from_folder(path).unwrap(),
    };
    TensorModel::new(config, &checkpoint, &options, &Cancel::never()).unwrap()
}

/// The largest difference of two rows, relative to the largest number.
fn difference(one: &[u32], other: &[u32]) -> f32 {
    let numbers = |bits: &[u32]| bits.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>();
    let (one, other) = (numbers(one), numbers(other));
    assert_eq!(one.len(), other.len());
    let largest = other.iter().fold(0_f32, |largest, number| largest.max(number.abs()));
    let pairs = one.iter().zip(&other);
    pairs.fold(0_f32, |most, (a, b)| if (a - b).is_nan() { f32::NAN } else { most.max((a - b).abs()) })
        / largest.max(f32::MIN_POSITIVE)
}

#[test]
fn tensors_give_a_row_the_same_numbers_in_every_pass() {
    let dir = folder();
    let sequences = sequences();
    let in_order: Vec<usize> = (0..sequences.len()).collect();
    let expected =
        run(&mut load(&dir, WeightType::F32, Isa::detect().unwrap(), true), &sequences, &in_order, 1);
    let isa = Isa::detect().unwrap();
    for matrices in [Matrices::Float, Matrices::Stored { isa, threads: 2, exact: false }] {
        let mut model = load_tensors(dir.path(), sequences.len(), matrices);
        let alone = run(&mut model, &sequences, &in_order, 1);
        // The slots that sequences have, and those that they leave empty between, differ from order to order.
        for order in
            [in_order.clone(), vec![8, 3, 0, 5, 1, 4, 2, 6, 7], vec![2, 0], vec![6, 0, 1], vec![1, 6]]
        {
            let together = run(&mut model, &sequences, &order, order.len());
            for &index in &order {
                for step in 0..2 {
                    let place = format!("step {step}, sequence {index} of {order:?}");
                    let (got, alone) = (&together[step][index], &alone[step][index]);
                    assert!(difference(got, alone) <= 1e-5, "{place}: {}", difference(got, alone));
                    let error = difference(got, &expected[step][index]);
                    assert!(error <= 1e-4, "{place}: {error} from the cpu engine");
                }
            }
        }
    }
}

#[test]
fn tensors_may_run_a_cancelled_pass_again() {
    let dir = folder();
    let mut model = load_tensors(dir.path(), 2, Matrices::Float);
    let tokens: Vec<u32> = (0..700).map(|at| at % VOCAB as u32).collect();
    let span = |seq| Span { seq: SeqId(seq), tokens: &tokens, start: 0, rows: Rows::Last };
    let expected = bits(&mut model, &[span(1)]);
    let stop = AtomicBool::new(true);
    let polled = || true;
    let cancelled = model.forward(&[span(2)], &Cancel::with_poll(&stop, &polled));
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    assert_eq!(bits(&mut model, &[span(2)]), expected);
    match model.forward(&[span(3)], &Cancel::never()) {
        Err(Error::Generation { reason }) => assert!(reason.contains("3 sequences"), "{reason}"),
        other => panic!("{other:?}"),
    }
    model.free(SeqId(1));
    assert_eq!(bits(&mut model, &[span(3)]), expected);
}

#[test]
fn products_by_candle_with_quantised_matrices_are_near_ours() {
    let dir = folder_with_outliers(1.0);
    let tokens: Vec<u32> = (0..60).map(|at| at % VOCAB as u32).collect();
    let span = Span { seq: SeqId(1), tokens: &tokens, start: 0, rows: Rows::All };
    for dtype in ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"] {
        let path = dir.path().join(format!("{dtype}.gguf"));
        let options = QuantizeOptions { dtype: dtype.into(), tokenizer: false, ..Default::default() };
        quantize(dir.path(), &path, &options, &mut |_, _| true, &Cancel::never()).unwrap();
        let isa = Isa::detect().unwrap();
        let [kept, ours, floats] =
            [Matrices::Quantized, Matrices::Stored { isa, threads: 2, exact: true }, Matrices::Float].map(
                |matrices| {
                    let mut model = load_tensors(&path, 1, matrices);
                    (bits(&mut model, &[span]), model.storage())
                },
            );
        assert_eq!(kept.1, ours.1, "{dtype}");
        assert_eq!(floats.1.len(), 1, "{dtype}");
        assert!(difference(&floats.0, &ours.0) < 1e-4, "{dtype}: {}", difference(&floats.0, &ours.0));
        // Candle rounds activations to 8 bits, which random weights amplify. Wrong blocks give 1 or more.
        let error = difference(&kept.0, &ours.0);
        assert!(error > 0.0 && error < 0.2, "{dtype}: {error}");
    }
}

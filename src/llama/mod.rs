//! The facade: load a model, then generate, stream or score text, or compute logits.
//!
//! - `options.rs`: the load options, and their values on this machine
//! - `opened.rs`: opens a checkpoint without reading its weights
//! - `load.rs`: chooses engine, device, types and context, and loads the model
//! - `text_stream.rs`: turns tokens into text, chunk by chunk
//! - `batch.rs`: generates for several prompts at once
//! - `grammar/`: answers that follow a JSON schema, a regular expression or a grammar
//! - `stop_strings.rs`: finds stop strings that are split over tokens
//! - `score.rs`: log-probabilities of given text
//! - `memory.rs`: the memory a model needs, and whether it is available
//! - `inspect.rs`: describes a checkpoint without loading its weights
//! - `quantize.rs`: converts a checkpoint to a GGUF file
//! - `roofline.rs`: measures the machine's peak rates
//!
//! ```no_run
//! use candle_llama::{Llama, LoadOptions, Prompt};
//! use candle_llama::model::Cancel;
//! use candle_llama::sampling::SamplingOptions;
//!
//! let llama = Llama::load("Llama-3.2-1B".as_ref(), &LoadOptions::default(), &Cancel::never())?;
//! let options = SamplingOptions { max_new_tokens: Some(32), ..Default::default() };
//! let prompt = Prompt::Text("The capital of France is".into());
//! println!("{}", llama.generate(prompt, &options, &Cancel::never())?.text);
//! # Ok::<(), candle_llama::error::Error>(())
//! ```

mod batch;
#[cfg_attr(not(feature = "grammar"), path = "grammar/unsupported.rs")]
mod grammar;
mod inspect;
mod load;
mod memory;
mod opened;
mod options;
mod quantize;
mod roofline;
mod score;
mod stop_strings;
mod text_stream;

use grammar::{GrammarMask, Grammars};
pub use inspect::{Inspection, inspect};
pub use load::LoadReport;
pub use memory::{MemoryEstimate, estimate_memory};
pub use options::{Compute, EngineKind, FloatType, KvType, LoadOptions, QuantizeType, UnknownName};
pub use quantize::{QuantizeOptions, QuantizeReport, quantize};
pub use roofline::roofline_peaks;
pub use score::{LogLikelihood, Score};
use text_stream::Decoding;
pub use text_stream::{Chunk, Completion, TextStream, Waker};

use crate::config::{GenerationConfig, LlamaConfig};
use crate::engine::{Engine, FinishReason, Metrics, Sequence};
use crate::error::{Error, Result};
use crate::model::{Cancel, Logits};
use crate::sampling::{OnOverflow, SamplingOptions, SamplingParams, TokenMask};
use crate::sys::sync::Mutex;
use crate::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;
use std::time::Instant;

/// A loaded model. Its methods may be called from several threads.
pub struct Llama {
    path: PathBuf,
    engine: Arc<Engine>,
    tokenizer: OnceLock<Arc<Tokenizer>>,
    config: LlamaConfig,
    generation: GenerationConfig,
    eos_token_ids: Vec<u32>,
    report: LoadReport,
    notices: Notices,
    grammars: Grammars,
}

/// Warnings about prompts, for the caller.
#[derive(Default)]
struct Notices {
    /// Each with the thread whose prompt it is about.
    pending: Mutex<Vec<(ThreadId, String)>>,
    has_warned_of_bos: AtomicBool,
}

impl Notices {
    fn add(&self, warning: String) {
        self.pending.lock().push((std::thread::current().id(), warning));
    }

    /// Removes those of this thread.
    fn take(&self) -> Vec<String> {
        let own = std::thread::current().id();
        self.pending.lock().extract_if(.., |(thread, _)| *thread == own).map(|(_, warning)| warning).collect()
    }
}

/// A prompt whose answer is to be generated: tokenised and checked.
pub struct Request {
    /// None if the timeout was over before they were known.
    ids: Option<Vec<u32>>,
    /// Whether the answer continues the prompt's text.
    continues: bool,
    /// With what is left of the timeout.
    params: SamplingParams,
    /// The beginning of a constrained text.
    mask: Option<GrammarMask>,
}

/// The input of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text. Special tokens are added as the tokenizer's own config says.
    Text(String),
    /// Token ids, used as they are.
    TokenIds(Vec<u32>),
    /// Token ids of a conversation, used as they are. The answer is a text of its own, not the continuation
    /// of one, so that a SentencePiece tokenizer drops the space at its beginning.
    Conversation(Vec<u32>),
}

impl Llama {
    /// Loads a folder or a GGUF file.
    ///
    /// # Errors
    /// A typed [`Error`] for anything wrong with the files, the config or the options;
    /// [`Error::Cancelled`].
    pub fn load(path: &Path, options: &LoadOptions, cancel: &Cancel) -> Result<Self> {
        load::load(path, options, cancel)
    }

    /// The model's config.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The maximum number of tokens of a sequence, prompt and output together.
    pub fn context_length(&self) -> usize {
        self.engine.context_length()
    }

    /// The EOS tokens: those that end a text or a turn of a chat.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// What was loaded, and how.
    pub fn load_report(&self) -> &LoadReport {
        &self.report
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// Those of [`Tokenizer::open`], if the model has no readable tokenizer.
    pub fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(Arc::clone(tokenizer));
        }
        let opened = Arc::new(Tokenizer::open(&self.path)?);
        Ok(Arc::clone(self.tokenizer.get_or_init(|| opened)))
    }

    /// Continues a prompt.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad prompt or parameter, [`Error::ContextLength`] (or
    /// [`Error::TextLength`], which shows before it is tokenised) for a prompt
    /// that leaves no room for output, [`Error::Closed`], and the model's errors. [`Error::Cancelled`] while
    /// the prompt is tokenised; later, cancelling returns the tokens so far, with the finish reason
    /// "cancelled".
    pub fn generate(&self, prompt: Prompt, options: &SamplingOptions, cancel: &Cancel) -> Result<Completion> {
        self.start(self.request(prompt, options, cancel)?)?.complete(cancel)
    }

    /// Continues a prompt, chunk by chunk. The first chunk includes the prefill.
    ///
    /// # Errors
    /// As [`Llama::generate`].
    pub fn stream(&self, prompt: Prompt, options: &SamplingOptions) -> Result<TextStream> {
        self.start(self.request(prompt, options, &Cancel::never())?)
    }

    /// Warnings about prompts that this thread has used since its last call.
    pub fn take_warnings(&self) -> Vec<String> {
        self.notices.take()
    }

    /// Tokenises and checks a prompt. Its timeout includes that.
    ///
    /// # Errors
    /// As [`Llama::generate`]; [`Error::Cancelled`].
    pub fn request(&self, prompt: Prompt, options: &SamplingOptions, cancel: &Cancel) -> Result<Request> {
        self.engine.check_open()?;
        let mut params = SamplingParams::resolve(options, &self.generation, self.engine.vocab_size())?;
        let continues = !matches!(prompt, Prompt::Conversation(_));
        let started = Instant::now();
        let is_late = || params.timeout.is_some_and(|timeout| started.elapsed() >= timeout);
        let (stop, should_stop) = (AtomicBool::new(false), || is_late() || cancel.is_cancelled());
        let ids = match self.ids(prompt, params.on_overflow, &Cancel::with_poll(&stop, &should_stop)) {
            Err(Error::Cancelled) if !cancel.is_cancelled() => None,
            ids => Some(ids?),
        };
        if let Some(ids) = &ids {
            self.engine.check_prompt(ids, params.on_overflow)?;
        }
        let mask = params.constraint.as_ref().map(|constraint| {
            self.grammars.begin(constraint, self.tokenizer()?.as_ref(), &self.eos_token_ids, cancel)
        });
        let mask = mask.transpose()?;
        params.timeout = params.timeout.map(|timeout| timeout.saturating_sub(started.elapsed()));
        Ok(Request { ids, continues, params, mask })
    }

    /// Starts to generate. What is left of the timeout counts from now on.
    ///
    /// # Errors
    /// Those of [`Engine::generate`], and of the tokenizer if stop strings need it.
    pub fn start(&self, request: Request) -> Result<TextStream> {
        let is_turn = !request.continues;
        let (stream, mut sequence) = self.sequence(request)?;
        if is_turn {
            sequence.iter_mut().for_each(Sequence::set_turn);
        }
        self.engine.submit(sequence.into_iter().collect())?;
        Ok(stream)
    }

    /// The stream of a request and its sequence, which is not submitted yet. There is none if the timeout was
    /// over before.
    fn sequence(&self, request: Request) -> Result<(TextStream, Option<Sequence>)> {
        let Request { ids, continues, mut params, mask } = request;
        let Some(ids) = ids else {
            return Ok((TextStream::ended(&params, Some(FinishReason::Timeout)), None));
        };
        // A prompt of ids needs no tokenizer, unless stop strings must be found in the output.
        let tokenizer = if params.stop.is_empty() { self.tokenizer().ok() } else { Some(self.tokenizer()?) };
        // Special tokens are not part of the text, so in stop strings they are found by their ids.
        let special = |stop: &String| {
            let id = match params.skip_special_tokens {
                true => tokenizer.as_ref()?.leading_special_token(stop)?,
                false => tokenizer.as_ref()?.special_token_id(stop)?,
            };
            Some((id, stop.clone()))
        };
        let special_stops: Vec<(u32, String)> = params.stop.iter().filter_map(special).collect();
        params.stop_token_ids.extend(special_stops.iter().map(|(id, _)| *id));
        let given = ids.len();
        let decoder = tokenizer.map(|tokenizer| {
            let decoder = tokenizer.decode_stream(params.skip_special_tokens);
            match (&mask, continues) {
                (Some(_), _) => decoder.verbatim(),
                (None, true) => decoder.continuing(&ids),
                (None, false) => decoder,
            }
        });
        let mask = mask.map(|mask| -> Box<dyn TokenMask> { Box::new(mask) });
        let kept = self.engine.used_tokens(given, &params);
        let decoding = Decoding { decoder, special_stops };
        let (stream, sequence) = TextStream::new(&params.clone(), kept, decoding, |sink| {
            self.engine.generate(ids, params, &self.eos_token_ids, mask, sink)
        })?;
        if kept < given {
            self.notices.add(format!(
                "the prompt's first {} of {given} tokens were cut, because on_overflow is \"truncate_left\": \
                 {kept} are left, and room for {} new ones",
                given - kept,
                self.context_length() - kept
            ));
        }
        Ok((stream, Some(sequence)))
    }

    /// What the engine does and has done.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Forked`] and [`Error::Internal`], as every method.
    pub fn metrics(&self) -> Result<Metrics> {
        self.engine.metrics()
    }

    /// The logits of the last `last` rows of `token_ids` (None: of all).
    ///
    /// # Errors
    /// As [`Engine::logits`].
    pub fn logits(&self, token_ids: &[u32], last: Option<usize>, cancel: &Cancel) -> Result<Logits> {
        self.engine.logits(token_ids, last, cancel)
    }

    /// Interrupts the running forward pass, ends all sequences, and frees the weights and the KV cache.
    pub fn close(&self) {
        self.engine.close();
    }

    /// A prompt's token ids. Text gets special tokens as the tokenizer's own config says. Text that surely
    /// exceeds the context is refused before it is tokenised, unless `on_overflow` cuts it.
    fn ids(&self, prompt: Prompt, on_overflow: OnOverflow, cancel: &Cancel) -> Result<Vec<u32>> {
        let text = match prompt {
            Prompt::Text(text) => text,
            Prompt::TokenIds(ids) | Prompt::Conversation(ids) => return Ok(ids),
        };
        let tokenizer = self.tokenizer()?;
        // A token has at least a byte. Finding the longest one takes some milliseconds.
        if on_overflow == OnOverflow::Error && text.len() > self.context_length() {
            let (bytes, context_length) = (text.len(), self.context_length());
            let prompt_tokens = tokenizer.fewest_tokens(&text);
            // Scoring takes one token more than the context holds.
            if prompt_tokens > context_length + 1 {
                return Err(Error::TextLength { bytes, prompt_tokens, context_length });
            }
        }
        let ids = tokenizer.encode_unless_cancelled(&text, true, false, cancel)?;
        if let ([first, second, ..], Some(bos)) = (ids.as_slice(), tokenizer.bos_token_id())
            && [*first, *second] == [bos; 2]
            && !self.notices.has_warned_of_bos.swap(true, Ordering::Relaxed)
        {
            let token = tokenizer.id_to_token(bos).unwrap_or_default();
            self.notices.add(format!(
                "the prompt begins with {token:?}, and the tokenizer adds another one: leave it out, or pass \
                 the ids of encode(prompt, add_special_tokens=False)"
            ));
        }
        Ok(ids)
    }
}

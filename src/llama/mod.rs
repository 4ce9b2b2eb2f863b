//! The facade: load a model, then generate, stream, chat, or look at its logits.
//!
//! - `options.rs`: how to load; what the options come to on this machine
//! - `opened.rs`: what is known of a model before its weights are read
//! - `load.rs`: which engine, device, types and context a path and its options give
//! - `text_stream.rs`: tokens to text, chunk by chunk
//! - `batch.rs`: several prompts at once
//! - `stop_strings.rs`: stop strings that straddle tokens
//! - `score.rs`: how likely given text is
//! - `memory.rs`: what a model takes, and whether there is room for it
//! - `inspect.rs`: what a checkpoint is, without loading its weights
//! - `quantize.rs`: a checkpoint to a GGUF file
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

pub use inspect::{Inspection, inspect};
pub use load::LoadReport;
pub use memory::{MemoryEstimate, estimate_memory};
pub use options::{Compute, EngineKind, FloatType, LoadOptions, QuantizeType, UnknownName};
pub use quantize::{QuantizeOptions, QuantizeReport, quantize};
pub use roofline::roofline_peaks;
pub use score::{LogLikelihood, Score};
pub use text_stream::{Chunk, Completion, TextStream};

use crate::config::{GenerationConfig, LlamaConfig};
use crate::engine::{Engine, Sequence};
use crate::error::Result;
use crate::model::{Cancel, Logits};
use crate::sampling::{SamplingOptions, SamplingParams};
use crate::tokenizer::{ChatTemplateOptions, Tokenizer};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// A loaded model. Its methods may be called from several threads.
pub struct Llama {
    path: PathBuf,
    engine: Arc<Engine>,
    tokenizer: OnceLock<Arc<Tokenizer>>,
    config: LlamaConfig,
    generation: GenerationConfig,
    eos_token_ids: Vec<u32>,
    report: LoadReport,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text; it gets the special tokens that the tokenizer's own config says.
    Text(String),
    /// Token ids, used as they are.
    TokenIds(Vec<u32>),
}

impl Llama {
    /// Loads a folder or a GGUF file.
    ///
    /// # Errors
    /// Whatever is wrong with the files, the config or the options, as a typed [`Error`]; [`Error::Cancelled`].
    pub fn load(path: &Path, options: &LoadOptions, cancel: &Cancel) -> Result<Self> {
        load::load(path, options, cancel)
    }

    /// The model's config.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The most tokens of a sequence, prompt and output together.
    pub fn context_length(&self) -> usize {
        self.engine.context_length()
    }

    /// The tokens that end a text or a turn.
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
    /// Those of [`Tokenizer::open`], if the model came without one that can be read.
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
    /// [`Error::InvalidArgument`] for a bad prompt or parameter, [`Error::ContextLength`] for a prompt
    /// that leaves no room, [`Error::Closed`], and the model's own. Cancelling is no error: the answer
    /// up to then says so in its finish reason.
    pub fn generate(&self, prompt: Prompt, options: &SamplingOptions, cancel: &Cancel) -> Result<Completion> {
        self.stream(prompt, options)?.complete(cancel)
    }

    /// Continues a prompt, chunk by chunk. The prompt is read with the first chunk.
    ///
    /// # Errors
    /// As [`Llama::generate`].
    pub fn stream(&self, prompt: Prompt, options: &SamplingOptions) -> Result<TextStream> {
        self.engine.check_open()?;
        let params = SamplingParams::resolve(options, &self.generation, self.engine.vocab_size())?;
        self.stream_ids(self.ids(prompt)?, params)
    }

    fn stream_ids(&self, prompt: Vec<u32>, params: SamplingParams) -> Result<TextStream> {
        // Ids in need no tokenizer, unless text is to be looked for in what comes out.
        let tokenizer = if params.stop.is_empty() { self.tokenizer().ok() } else { Some(self.tokenizer()?) };
        let sequence = Sequence::new(&self.engine, prompt, params, &self.eos_token_ids)?;
        Ok(TextStream::new(sequence, tokenizer.map(|tokenizer| tokenizer.decode_stream(true))))
    }

    /// A chat's prompt: the messages through the chat template, which writes all special tokens.
    ///
    /// # Errors
    /// Those of [`Tokenizer::apply_chat_template`].
    pub fn chat_prompt(&self, messages: &Value, options: &ChatTemplateOptions) -> Result<Prompt> {
        let tokenizer = self.tokenizer()?;
        let text = tokenizer.apply_chat_template(messages, options)?;
        Ok(Prompt::TokenIds(tokenizer.encode(&text, false, false)?))
    }

    /// The logits of the last `last` rows of `token_ids` (None: of all).
    ///
    /// # Errors
    /// As [`Engine::logits`].
    pub fn logits(&self, token_ids: &[u32], last: Option<usize>, cancel: &Cancel) -> Result<Logits> {
        self.engine.logits(token_ids, last, cancel)
    }

    /// Frees the weights and all keys and values, after the step that is running.
    pub fn close(&self) {
        self.engine.close();
    }

    /// A prompt's token ids: text gets the special tokens that the tokenizer's own config says.
    fn ids(&self, prompt: Prompt) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Text(text) => self.tokenizer()?.encode(&text, true, false),
            Prompt::TokenIds(ids) => Ok(ids),
        }
    }
}

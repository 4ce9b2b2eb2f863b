//! From a template's source to a program for minijinja's interpreter, with operators of our own.
//!
//! The source is tokenized once to bound its nesting and to replace what minijinja has no syntax for. Then
//! the compiled program's operators are replaced by calls of the filters in [`super::operators`], which do
//! what Python's do and count what they make. Their names are such that no template can call them.

use std::collections::BTreeMap;

use minijinja::machinery::{CodeGenerator, Instruction, Instructions, Span, Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind, Value};

use super::operators;

/// Longest source, in bytes.
const MAX_SOURCE: usize = 1 << 20;
/// Most tokens between two delimiters, and most `elif` in all: the parser and the compiler recurse for each.
const MAX_TOKENS: usize = 4000;
const MAX_ELIF: usize = 1000;
/// Most pairs of tokens between the same two delimiters, in all: the compiler looks at an expression again for
/// each one that it is in. The most that a model's template was seen to have is 20 000.
const MAX_PAIRS: usize = 250_000_000;

/// A variable of value 1. With it as a factor no product is computed by the compiler, which would make
/// strings of any length before the program starts.
pub(super) const ONE: &str = "_candle_llama_one";
/// No place in the interpreter's cache of filters.
const UNCACHED: u8 = u8::MAX;

pub(super) const NAME: &str = "chat_template";

/// A compiled template: its program and those of its blocks.
pub(super) struct Program<'a> {
    pub(super) main: Instructions<'a>,
    pub(super) blocks: BTreeMap<&'a str, Instructions<'a>>,
}

/// transformers' settings.
pub(super) fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// The source as minijinja can parse it: generation tags become a scope, and products get a third factor.
/// Line numbers stay as they are.
pub(super) fn prepare(source: &str) -> Result<String, Error> {
    if source.len() > MAX_SOURCE {
        return Err(too_large(format!("it has {} bytes, the most is {MAX_SOURCE}", source.len())));
    }
    let mut prepared = String::with_capacity(source.len());
    let mut copied = 0;
    let mut replace = |span: Span, text: &str| {
        prepared.push_str(source.get(copied..span.start_offset as usize).unwrap_or_default());
        prepared.push_str(text);
        copied = span.end_offset as usize;
    };
    let (mut tokens, mut elifs, mut pairs) = (0, 0, 0);
    let (mut before, mut opens_call) = (None, false);
    for token in tokenize(source, false, syntax()?) {
        // The parser stops at the same place, and says where.
        let Ok((token, span)) = token else { break };
        tokens += 1;
        match token {
            Token::TemplateData(_) | Token::BlockStart | Token::VariableStart => tokens = 0,
            Token::Ident("generation") if before == Some(()) => replace(span, "with"),
            Token::Ident("endgeneration") if before == Some(()) => replace(span, "endwith"),
            Token::Ident("elif") if before == Some(()) => elifs += 1,
            // Not the star of `f(*arguments)`.
            Token::Mul if !opens_call => replace(span, &format!("*{ONE}*")),
            _ => {}
        }
        pairs += tokens;
        if tokens > MAX_TOKENS || elifs > MAX_ELIF || pairs > MAX_PAIRS {
            return Err(too_large(format!(
                "too many expressions in one another or elif, line {}",
                span.start_line
            )));
        }
        opens_call = matches!(token, Token::ParenOpen | Token::Comma);
        before = matches!(token, Token::BlockStart).then_some(());
    }
    prepared.push_str(source.get(copied..).unwrap_or_default());
    Ok(prepared)
}

fn too_large(reason: String) -> Error {
    Error::new(ErrorKind::SyntaxError, format!("the template is too large: {reason}"))
}

/// Compiles a prepared source.
pub(super) fn compile(source: &str) -> Result<Program<'_>, Error> {
    let tree = parse(source, NAME, syntax()?)?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&tree);
    let (main, blocks) = generator.finish();
    let blocks = blocks.iter().map(|(name, block)| (*name, replace_operators(block))).collect();
    Ok(Program { main: replace_operators(&main), blocks })
}

fn replace_operators<'a>(old: &Instructions<'a>) -> Instructions<'a> {
    let mut replaced = Vec::new();
    // Where each instruction of the old program begins in the new one.
    let mut starts = Vec::new();
    let mut length = 0;
    for index in 0.. {
        let Some(instruction) = old.get(index) else { break };
        let next = old.get(index + 1);
        let is_one =
            |instruction: Option<&Instruction<'_>>| matches!(instruction, Some(Instruction::Lookup(ONE)));
        let new = match instruction {
            Instruction::Lookup(ONE) if matches!(next, Some(Instruction::Mul)) => vec![],
            Instruction::Mul if is_one(index.checked_sub(1).and_then(|before| old.get(before))) => vec![],
            other => replacement(other),
        };
        starts.push(length);
        length += new.len() as u32;
        replaced.push(new);
    }
    starts.push(length);
    let moved = |target: u32| starts.get(target as usize).copied().unwrap_or(length);
    let mut program = Instructions::new(old.name(), old.source());
    for (index, instructions) in (0..).zip(replaced) {
        for mut instruction in instructions {
            if let Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::BuildMacro(_, target, _) = &mut instruction
            {
                *target = moved(*target);
            }
            match (old.get_span(index), old.get_line(index)) {
                (Some(span), _) => program.add_with_span(instruction, span),
                (None, Some(line)) => program.add_with_line(instruction, line.try_into().unwrap_or(u16::MAX)),
                (None, None) => program.add(instruction),
            };
        }
    }
    program
}

/// The instructions that take the place of one.
fn replacement<'a>(instruction: &Instruction<'a>) -> Vec<Instruction<'a>> {
    let call = |name: &'static str, arguments: u16| Instruction::ApplyFilter(name, Some(arguments), UNCACHED);
    match instruction {
        // Through the formatter, which counts what is written.
        Instruction::EmitRaw(text) => vec![Instruction::LoadConst(Value::from(*text)), Instruction::Emit],
        Instruction::Add => vec![call("+", 2)],
        Instruction::Mul => vec![call("*", 2)],
        Instruction::Rem => vec![call("%", 2)],
        Instruction::StringConcat => vec![call("~", 2)],
        Instruction::Eq => vec![call("==", 2)],
        Instruction::Ne => vec![call("==", 2), Instruction::Not],
        Instruction::Lt => vec![call("<", 2)],
        Instruction::Lte => vec![call("<=", 2)],
        Instruction::Gt => vec![call(">", 2)],
        Instruction::Gte => vec![call(">=", 2)],
        Instruction::In => vec![call(":in", 2)],
        Instruction::GetItem => vec![call("[]", 2)],
        Instruction::Slice => vec![call("[:]", 4)],
        // All but the last comparison of a chain. Their kind has no public name, but is written as one.
        Instruction::CompareAndPreserve(kind) => match operators::chained(&format!("{kind:?}")) {
            Some(name) => vec![call(name, 2), Instruction::UnpackList(2)],
            None => vec![call(":unknown", 2)],
        },
        Instruction::PushLoop(_) => vec![call(":iter", 1), instruction.clone()],
        Instruction::BuildList(Some(_)) | Instruction::BuildTuple(_) | Instruction::BuildMap(_) => {
            vec![instruction.clone(), call(":walk", 1)]
        }
        // The value lies below the namespace that it goes to.
        Instruction::SetAttr(_) => {
            vec![Instruction::Swap, call(":attribute", 1), Instruction::Swap, instruction.clone()]
        }
        other => vec![other.clone()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_a_scope() {
        let cases = [
            ("{%- generation +%}a{% endgeneration -%}", "{%- with +%}a{% endwith -%}"),
            ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
            ("{# {% generation %} #}{{ generation }}", "{# {% generation %} #}{{ generation }}"),
            (
                "{% set generation = 1 %}\n{{ 'é{% generation %}' }}",
                "{% set generation = 1 %}\n{{ 'é{% generation %}' }}",
            ),
        ];
        for (source, prepared) in cases {
            assert_eq!(prepare(source).unwrap(), prepared);
        }
    }

    #[test]
    fn products_are_not_computed_by_the_compiler() {
        assert_eq!(
            prepare("{{ 'é' * 3 ** 2 }} * {{ f(*a, *b) }}").unwrap(),
            format!("{{{{ 'é' *{ONE}* 3 ** 2 }}}} * {{{{ f(*a, *b) }}}}")
        );
        let source = prepare("{{ 'a' * 3 }}").unwrap();
        let program = compile(&source).unwrap().main;
        let is_product =
            |index| matches!(program.get(index), Some(Instruction::ApplyFilter("*", Some(2), _)));
        assert_eq!((0..9).filter(|&index| is_product(index)).count(), 1);
        assert!((0..9).all(|index| !matches!(program.get(index), Some(Instruction::Lookup(_)))));
    }

    #[test]
    fn large_sources_are_refused() {
        for source in ["a".repeat(MAX_SOURCE + 1), format!("{{{{ {}1 }}}}", "-".repeat(MAX_TOKENS))] {
            assert!(prepare(&source).unwrap_err().to_string().contains("too large"));
        }
        assert!(
            prepare(&format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(MAX_ELIF + 1))).is_err()
        );
        assert!(prepare(&"{{ a }}".repeat(MAX_TOKENS)).is_ok());
    }
}

//! From a template's source to a program for minijinja's interpreter.
//!
//! The source is tokenized once to bound its nesting and to replace what minijinja has no syntax for; its
//! parser makes a tree of it, and [`super::compiler`] a program of that.

use std::collections::BTreeMap;

use minijinja::machinery::{Instructions, Span, Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind};

use super::compiler;

/// Longest source, in bytes.
const MAX_SOURCE: usize = 1 << 20;
/// Most tokens between two delimiters, and most `elif` in all: the parser and the compiler recurse for each.
const MAX_TOKENS: usize = 4000;
const MAX_ELIF: usize = 1000;
/// The words that an operand follows.
const OPERATORS: [&str; 9] = ["and", "elif", "else", "if", "in", "is", "not", "or", "recursive"];

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

/// The source as minijinja can parse it: generation tags become a scope, and a plus before an operand two
/// minuses. Line numbers stay as they are.
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
    let (mut tokens, mut elifs) = (0, 0);
    // Whether each loop and generation tag around is a loop.
    let mut around = Vec::new();
    let (mut before, mut ends_operand) = (None, false);
    for token in tokenize(source, false, syntax()?) {
        // The parser stops at the same place, and says where.
        let Ok((token, span)) = token else { break };
        tokens += 1;
        match token {
            Token::TemplateData(_) | Token::BlockStart | Token::VariableStart => tokens = 0,
            Token::Ident(tag) if before == Some(()) => match tag {
                "generation" => {
                    around.push(false);
                    replace(span, "with");
                }
                "endgeneration" => {
                    around.pop();
                    replace(span, "endwith");
                }
                "for" => around.push(true),
                "endfor" => {
                    around.pop();
                }
                "break" | "continue" if around.last() == Some(&false) => {
                    let reason = format!("{tag} in a generation tag, line {}", span.start_line);
                    return Err(Error::new(ErrorKind::SyntaxError, reason));
                }
                "elif" => elifs += 1,
                _ => {}
            },
            Token::Plus if !ends_operand => replace(span, "--"),
            _ => {}
        }
        if tokens > MAX_TOKENS || elifs > MAX_ELIF {
            return Err(too_large(format!(
                "too many expressions in one another or elif, line {}",
                span.start_line
            )));
        }
        ends_operand = match token {
            Token::Ident(name) => !OPERATORS.contains(&name),
            Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Int128(_) | Token::Float(_) => true,
            Token::ParenClose | Token::BracketClose | Token::BraceClose => true,
            _ => false,
        };
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
    compiler::compile(&parse(source, NAME, syntax()?)?, source)
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
    fn a_plus_before_an_operand_becomes_two_minuses() {
        assert_eq!(
            prepare("{{ +1 + x[+2] }}{{ (a)+b }} + {% if +x %}{{- +y }}{% endif %}").unwrap(),
            "{{ --1 + x[--2] }}{{ (a)+b }} + {% if --x %}{{- --y }}{% endif %}"
        );
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

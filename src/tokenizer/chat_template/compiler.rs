//! A parsed template to a program for minijinja's interpreter.
//!
//! minijinja has a compiler of its own, but its operators compute by other rules than Python's, are computed
//! by the compiler where they can be, and count nothing; and its scopes are not always Jinja's. Here every
//! operator is a call of a filter of [`super::operators`], and every scope is as Jinja draws it.

use std::collections::BTreeMap;

use minijinja::machinery::ast::Stmt;
use minijinja::machinery::{CodeGenerator, Instruction, Instructions, Span, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind};

use super::program::{NAME, Program};

/// No place in the interpreter's cache of filters and tests.
pub(super) const UNCACHED: u8 = u8::MAX;
/// A jump whose target is not known yet.
pub(super) const UNKNOWN: u32 = u32::MAX;

/// Jinja's filters. Any other is an error even where it is not reached.
pub(super) const FILTERS: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];
/// Jinja's tests.
pub(super) const TESTS: [&str; 39] = [
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// What must be closed where a loop is left in the middle.
pub(super) enum Open {
    /// Where an iteration starts, and the jumps to its end.
    Loop(u32, Vec<u32>),
    Frame,
    Capture,
    AutoEscape,
}

pub(super) struct Compiler<'a> {
    source: &'a str,
    pub(super) program: Instructions<'a>,
    length: u32,
    pub(super) blocks: BTreeMap<&'a str, Instructions<'a>>,
    pub(super) span: Span,
    /// From the outside in.
    pub(super) open: Vec<Open>,
    /// In an `if`, where a filter that does not exist is an error only when it is reached.
    pub(super) is_soft: bool,
    /// What starts a capture. Its operand has no public name, so it comes from minijinja's compiler.
    pub(super) begin_capture: Instruction<'a>,
}

pub(super) type Outcome = Result<(), Error>;

/// Compiles `tree`, the template of `source`.
pub(super) fn compile<'a>(tree: &Stmt<'a>, source: &'a str) -> Result<Program<'a>, Error> {
    let sample = parse("{% filter e %}{% endfilter %}", NAME, SyntaxConfig::default())?;
    let mut generator = CodeGenerator::new(NAME, "");
    generator.compile_stmt(&sample);
    let begin_capture = generator.finish().0.get(0).cloned();
    let begin_capture = begin_capture.ok_or_else(|| Error::from(ErrorKind::BadSerialization))?;
    let mut compiler = Compiler::new(source, begin_capture);
    compiler.statement(tree)?;
    Ok(Program { main: compiler.program, blocks: compiler.blocks })
}

impl<'a> Compiler<'a> {
    fn new(source: &'a str, begin_capture: Instruction<'a>) -> Self {
        Self {
            source,
            program: Instructions::new(NAME, source),
            length: 0,
            blocks: BTreeMap::new(),
            span: Span::default(),
            open: Vec::new(),
            is_soft: false,
            begin_capture,
        }
    }

    /// Compiles a block's body to a program of its own.
    pub(super) fn block(&mut self, name: &'a str, body: &[Stmt<'a>]) -> Outcome {
        let mut compiler = Compiler::new(self.source, self.begin_capture.clone());
        compiler.statements(body)?;
        self.blocks.append(&mut compiler.blocks);
        self.blocks.insert(name, compiler.program);
        Ok(())
    }

    pub(super) fn add(&mut self, instruction: Instruction<'a>) -> u32 {
        self.length += 1;
        self.program.add_with_span(instruction, self.span)
    }

    /// A call of one of our filters, with what lies on top of the stack.
    pub(super) fn apply(&mut self, filter: &'static str, arguments: u16) {
        self.add(Instruction::ApplyFilter(filter, Some(arguments), UNCACHED));
    }

    /// The place of the instruction that is added next.
    pub(super) fn next(&self) -> u32 {
        self.length
    }

    /// Lets the jump at `place` go to what comes next.
    pub(super) fn land(&mut self, place: u32) {
        let here = self.next();
        if let Some(
            Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target),
        ) = self.program.get_mut(place)
        {
            *target = here;
        }
    }

    pub(super) fn fail(&self, reason: &str) -> Error {
        Error::new(ErrorKind::SyntaxError, format!("{reason}, line {}", self.span.start_line))
    }

    /// Checks that Jinja knows a name.
    fn check_name(&self, kind: &str, known: &[&str], name: &str) -> Outcome {
        if self.is_soft || known.contains(&name) {
            return Ok(());
        }
        Err(self.fail(&format!("there is no {kind} named {name:?}")))
    }

    pub(super) fn check_filter(&self, name: &str) -> Outcome {
        self.check_name("filter", &FILTERS, name)
    }

    pub(super) fn check_test(&self, name: &str) -> Outcome {
        self.check_name("test", &TESTS, name)
    }
}

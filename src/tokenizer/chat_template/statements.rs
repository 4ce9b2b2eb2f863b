//! Statements to instructions, with Jinja's scopes: loops and their `else`, `with`, blocks that capture, macros
//! and calls have one of their own, `if` has none.

use minijinja::Value;
use minijinja::machinery::Instruction;
use minijinja::machinery::ast::{Expr, ForLoop, IfCond, Spanned, Stmt, WithBlock};

use super::compiler::{Compiler, Open, Outcome, UNKNOWN};
use super::definitions::SPECIAL;

/// The interpreter's flags: the loop has a variable `loop`; it calls itself.
const WITH_LOOP_VARIABLE: u8 = 1;
const RECURSIVE: u8 = 2;

impl<'a> Compiler<'a> {
    pub(super) fn statements(&mut self, statements: &[Stmt<'a>]) -> Outcome {
        statements.iter().try_for_each(|statement| self.statement(statement))
    }

    /// Statements in a scope that has been opened.
    pub(super) fn scope(&mut self, statements: &[Stmt<'a>]) -> Outcome {
        let is_soft = std::mem::replace(&mut self.is_soft, false);
        self.statements(statements)?;
        self.is_soft = is_soft;
        Ok(())
    }

    pub(super) fn statement(&mut self, statement: &Stmt<'a>) -> Outcome {
        match statement {
            Stmt::Template(template) => self.statements(&template.children)?,
            Stmt::EmitExpr(emitted) => {
                self.expression(&emitted.expr)?;
                self.span = emitted.span();
                self.add(Instruction::Emit);
            }
            Stmt::EmitRaw(text) => {
                self.span = text.span();
                // Through the formatter, which counts what is written.
                self.add(Instruction::LoadConst(Value::from_safe_string(text.raw.to_owned())));
                self.add(Instruction::Emit);
            }
            Stmt::ForLoop(for_loop) => {
                self.span = for_loop.span();
                self.for_loop(for_loop)?;
            }
            Stmt::IfCond(condition) => {
                self.span = condition.span();
                let is_soft = std::mem::replace(&mut self.is_soft, true);
                self.condition(condition)?;
                self.is_soft = is_soft;
            }
            Stmt::WithBlock(with) => {
                self.span = with.span();
                self.with(with)?;
            }
            Stmt::Set(set) => {
                self.span = set.span();
                self.declare(&set.target);
                self.expression(&set.expr)?;
                self.assign(&set.target)?;
            }
            Stmt::SetBlock(set) => {
                self.span = set.span();
                self.declare(&set.target);
                self.capture(&set.body, set.filter.as_ref())?;
                self.assign(&set.target)?;
            }
            Stmt::FilterBlock(filter) => {
                self.span = filter.span();
                self.capture(&filter.body, Some(&filter.filter))?;
                self.add(Instruction::Emit);
            }
            Stmt::AutoEscape(escape) => {
                self.span = escape.span();
                self.expression(&escape.enabled)?;
                self.add(Instruction::PushAutoEscape);
                self.open.push(Open::AutoEscape);
                self.add(Instruction::PushWith);
                self.open.push(Open::Frame);
                self.scope(&escape.body)?;
                self.close(2);
            }
            Stmt::Block(block) => {
                self.span = block.span();
                self.block(block.name, &block.body)?;
                self.add(Instruction::CallBlock(block.name));
            }
            // There are no other templates to load.
            Stmt::Include(include) => self.other_template(&include.name)?,
            Stmt::Extends(extends) => self.other_template(&extends.name)?,
            Stmt::Import(import) => self.other_template(&import.expr)?,
            Stmt::FromImport(import) => self.other_template(&import.expr)?,
            Stmt::Macro(definition) => {
                self.macro_value(definition, Some(definition.name))?;
                self.add(Instruction::StoreLocal(definition.name));
            }
            Stmt::CallBlock(block) => {
                self.span = block.call.span();
                self.call(&block.call, Some(&block.macro_decl))?;
                self.add(Instruction::Emit);
            }
            Stmt::Continue(statement) => {
                self.span = statement.span();
                if let Some((start, _)) = self.leave_iteration() {
                    self.add(Instruction::Jump(start));
                }
            }
            Stmt::Break(statement) => {
                self.span = statement.span();
                if let Some((_, index)) = self.leave_iteration() {
                    let jump = self.add(Instruction::Jump(UNKNOWN));
                    if let Some(Open::Loop(_, breaks)) = self.open.get_mut(index) {
                        breaks.push(jump);
                    }
                }
            }
            // transformers does not switch it on.
            Stmt::Do(statement) => {
                self.span = statement.span();
                return Err(self.fail("unknown statement do"));
            }
        }
        Ok(())
    }

    fn other_template(&mut self, name: &Expr<'a>) -> Outcome {
        self.expression(name)?;
        self.span = name.span();
        self.apply(":template", 1);
        self.add(Instruction::DiscardTop);
        Ok(())
    }

    /// Closes the innermost `count` of what is open.
    fn close(&mut self, count: usize) {
        for _ in 0..count {
            match self.open.pop() {
                Some(Open::Frame) => self.add(Instruction::PopFrame),
                Some(Open::Capture) => self.add(Instruction::EndCapture),
                Some(Open::AutoEscape) => self.add(Instruction::PopAutoEscape),
                Some(Open::Loop(..)) | None => continue,
            };
        }
    }

    /// Closes what an iteration has open, where it is left in the middle. Returns where iterations of the
    /// loop start, and the loop's place among what is open.
    fn leave_iteration(&mut self) -> Option<(u32, usize)> {
        let index = self.open.iter().rposition(|open| matches!(open, Open::Loop(..)))?;
        let mut closing = Vec::new();
        for open in self.open.iter().skip(index + 1).rev() {
            match open {
                Open::Frame => closing.push(Instruction::PopFrame),
                Open::Capture => closing.extend([Instruction::EndCapture, Instruction::DiscardTop]),
                Open::AutoEscape => closing.push(Instruction::PopAutoEscape),
                Open::Loop(..) => {}
            }
        }
        for instruction in closing {
            self.add(instruction);
        }
        match self.open.get(index) {
            Some(Open::Loop(start, _)) => Some((*start, index)),
            _ => None,
        }
    }

    fn condition(&mut self, condition: &Spanned<IfCond<'a>>) -> Outcome {
        self.expression(&condition.expr)?;
        let otherwise = self.add(Instruction::JumpIfFalse(UNKNOWN));
        self.statements(&condition.true_body)?;
        if condition.false_body.is_empty() {
            self.land(otherwise);
            return Ok(());
        }
        let end = self.add(Instruction::Jump(UNKNOWN));
        self.land(otherwise);
        self.statements(&condition.false_body)?;
        self.land(end);
        Ok(())
    }

    /// All values are computed outside of the scope, so that none sees another.
    fn with(&mut self, with: &Spanned<WithBlock<'a>>) -> Outcome {
        for (target, _) in &with.assignments {
            self.declare(target);
        }
        for (_, value) in &with.assignments {
            self.expression(value)?;
        }
        self.add(Instruction::PushWith);
        self.open.push(Open::Frame);
        for (target, _) in with.assignments.iter().rev() {
            self.assign(target)?;
        }
        self.scope(&with.body)?;
        self.close(1);
        Ok(())
    }

    /// Leaves what `body` writes on the stack, through `filter` if there is one.
    fn capture(&mut self, body: &[Stmt<'a>], filter: Option<&Expr<'a>>) -> Outcome {
        self.add(Instruction::PushWith);
        self.open.push(Open::Frame);
        self.add(self.begin_capture.clone());
        self.open.push(Open::Capture);
        self.scope(body)?;
        self.close(1);
        // In the scope still: the filter's arguments may name what the body assigns.
        if let Some(filter) = filter {
            self.expression(filter)?;
        }
        self.close(1);
        Ok(())
    }

    /// Assigns the names of `target` in a part of the program that is never run, so that to [`special_names`] they
    /// are the template's own from here on: to Jinja, what is assigned comes before what is computed for it.
    ///
    /// [`special_names`]: Self::special_names
    fn declare(&mut self, target: &Expr<'a>) {
        let targets =
            if let Expr::List(list) = target { &list.items[..] } else { std::slice::from_ref(target) };
        for target in targets {
            let Expr::Var(variable) = target else { continue };
            if SPECIAL.contains(&variable.id) {
                let over = self.add(Instruction::Jump(UNKNOWN));
                self.add(Instruction::StoreLocal(variable.id));
                self.land(over);
            }
        }
    }

    fn assign(&mut self, target: &Expr<'a>) -> Outcome {
        match target {
            Expr::Var(variable) => {
                self.add(Instruction::StoreLocal(variable.id));
            }
            Expr::List(list) => {
                self.apply(":unpack", 1);
                self.add(Instruction::UnpackList(list.items.len()));
                for item in &list.items {
                    self.assign(item)?;
                }
            }
            Expr::GetAttr(attribute) => {
                let Expr::Var(_) = &attribute.expr else { return Err(self.fail("cannot assign to this")) };
                self.expression(&attribute.expr)?;
                self.add(Instruction::LoadConst(Value::from(attribute.name)));
                self.apply(":set", 3);
                self.add(Instruction::DiscardTop);
            }
            _ => return Err(self.fail("cannot assign to this")),
        }
        Ok(())
    }

    fn for_loop(&mut self, for_loop: &Spanned<ForLoop<'a>>) -> Outcome {
        let has_else = !for_loop.else_body.is_empty();
        self.declare(&for_loop.target);
        // Whether no iteration has come to its end, which is what Jinja's `else` asks.
        if has_else && !for_loop.recursive {
            self.add(Instruction::LoadConst(Value::from(true)));
        }
        self.iterated(for_loop)?;
        let recursive = if for_loop.recursive { RECURSIVE } else { 0 };
        self.add(Instruction::PushLoop(WITH_LOOP_VARIABLE | recursive));
        // The loop calls itself by a jump to the instruction before.
        if has_else && for_loop.recursive {
            self.add(Instruction::LoadConst(Value::from(true)));
        }
        let start = self.add(Instruction::Iterate(UNKNOWN));
        self.open.push(Open::Loop(start, Vec::new()));
        self.assign(&for_loop.target)?;
        self.scope(&for_loop.body)?;
        if has_else {
            self.add(Instruction::DiscardTop);
            self.add(Instruction::LoadConst(Value::from(false)));
        }
        self.add(Instruction::Jump(start));
        self.land(start);
        if let Some(Open::Loop(_, breaks)) = self.open.pop() {
            for jump in breaks {
                self.land(jump);
            }
        }
        if !for_loop.recursive {
            self.add(Instruction::PopLoopFrame);
        }
        if has_else {
            let end = self.add(Instruction::JumpIfFalse(UNKNOWN));
            self.add(Instruction::PushWith);
            self.open.push(Open::Frame);
            self.scope(&for_loop.else_body)?;
            self.close(1);
            self.land(end);
        }
        // Where the loop was called, the program goes on there.
        if for_loop.recursive {
            self.add(Instruction::PopLoopFrame);
        }
        Ok(())
    }

    /// Leaves what a loop goes through on the stack.
    fn iterated(&mut self, for_loop: &Spanned<ForLoop<'a>>) -> Outcome {
        let Some(filter) = &for_loop.filter_expr else {
            self.expression(&for_loop.iter)?;
            self.apply(":iter", 1);
            return Ok(());
        };
        // A loop that leaves the items that pass on the stack, and above them how many they are.
        self.add(Instruction::LoadConst(Value::from(0)));
        self.expression(&for_loop.iter)?;
        self.apply(":iter", 1);
        self.add(Instruction::PushLoop(0));
        let start = self.add(Instruction::Iterate(UNKNOWN));
        self.add(Instruction::DupTop);
        self.assign(&for_loop.target)?;
        self.expression(filter)?;
        let fails = self.add(Instruction::JumpIfFalse(UNKNOWN));
        self.add(Instruction::Swap);
        self.add(Instruction::LoadConst(Value::from(1)));
        self.add(Instruction::Add);
        self.add(Instruction::Jump(start));
        self.land(fails);
        self.add(Instruction::DiscardTop);
        self.add(Instruction::Jump(start));
        self.land(start);
        self.add(Instruction::PopLoopFrame);
        self.add(Instruction::BuildList(None));
        Ok(())
    }
}

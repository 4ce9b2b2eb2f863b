//! Expressions to instructions that leave a value on the stack.

use std::collections::BTreeSet;

use minijinja::machinery::Instruction;
use minijinja::machinery::ast::{
    BinOpKind, Call, CallArg, CallType, Compare, CompareOpKind, Expr, Macro, Spanned, UnaryOpKind,
};
use minijinja::{Error, Value};

use super::attributes;
use super::compiler::{Compiler, Outcome, UNCACHED, UNKNOWN};

impl<'a> Compiler<'a> {
    fn optional(&mut self, expression: Option<&Expr<'a>>) -> Outcome {
        match expression {
            Some(expression) => self.expression(expression),
            None => {
                self.add(Instruction::LoadConst(Value::from(())));
                Ok(())
            }
        }
    }

    /// Leaves an expression's value on the stack.
    pub(super) fn expression(&mut self, expression: &Expr<'a>) -> Outcome {
        let outer = std::mem::replace(&mut self.span, expression.span());
        self.value(expression)?;
        self.span = outer;
        Ok(())
    }

    fn value(&mut self, expression: &Expr<'a>) -> Outcome {
        match expression {
            Expr::Var(variable) => {
                self.add(Instruction::Lookup(variable.id));
            }
            Expr::Const(constant) => {
                self.add(Instruction::LoadConst(constant.value.clone()));
            }
            Expr::Slice(slice) => {
                self.expression(&slice.expr)?;
                self.optional(slice.start.as_ref())?;
                self.optional(slice.stop.as_ref())?;
                self.optional(slice.step.as_ref())?;
                // Jinja computes what is constant ahead, and takes an error there for undefined.
                self.apply(if is_constant(expression) { ":[:]" } else { "[:]" }, 4);
            }
            Expr::UnaryOp(operation) => {
                self.expression(&operation.expr)?;
                match operation.op {
                    UnaryOpKind::Not => {
                        self.add(Instruction::Not);
                    }
                    UnaryOpKind::Neg => self.apply(":neg", 1),
                }
            }
            Expr::BinOp(operation) => {
                self.expression(&operation.left)?;
                let filter = match operation.op {
                    BinOpKind::ScAnd | BinOpKind::ScOr => {
                        let jump = self.add(match operation.op {
                            BinOpKind::ScAnd => Instruction::JumpIfFalseOrPop(UNKNOWN),
                            _ => Instruction::JumpIfTrueOrPop(UNKNOWN),
                        });
                        self.expression(&operation.right)?;
                        self.land(jump);
                        return Ok(());
                    }
                    BinOpKind::Eq => "==",
                    BinOpKind::Ne => "!=",
                    BinOpKind::Lt => "<",
                    BinOpKind::Lte => "<=",
                    BinOpKind::Gt => ">",
                    BinOpKind::Gte => ">=",
                    BinOpKind::In => ":in",
                    BinOpKind::Add => "+",
                    BinOpKind::Sub => "-",
                    BinOpKind::Mul => "*",
                    BinOpKind::Div => "/",
                    BinOpKind::FloorDiv => "//",
                    BinOpKind::Rem => "%",
                    BinOpKind::Pow => "**",
                    BinOpKind::Concat => "~",
                };
                self.expression(&operation.right)?;
                self.apply(filter, 2);
            }
            Expr::Compare(chain) => self.chain(chain)?,
            Expr::IfExpr(choice) => {
                let is_soft = std::mem::replace(&mut self.is_soft, true);
                self.expression(&choice.test_expr)?;
                let otherwise = self.add(Instruction::JumpIfFalse(UNKNOWN));
                self.expression(&choice.true_expr)?;
                let end = self.add(Instruction::Jump(UNKNOWN));
                self.land(otherwise);
                match &choice.false_expr {
                    Some(expression) => self.expression(expression)?,
                    None => {
                        self.add(Instruction::LoadConst(Value::UNDEFINED));
                    }
                }
                self.land(end);
                self.is_soft = is_soft;
            }
            Expr::Filter(filter) => {
                self.check_filter(filter.name)?;
                // In a block's tag the value is what the block captured.
                if let Some(expression) = &filter.expr {
                    self.expression(expression)?;
                }
                let count = self.arguments(&filter.args, 1, None)?;
                self.add(Instruction::ApplyFilter(filter.name, count, UNCACHED));
            }
            Expr::Test(test) => {
                self.check_test(test.name)?;
                self.expression(&test.expr)?;
                let count = self.arguments(&test.args, 1, None)?;
                self.add(Instruction::PerformTest(test.name, count, UNCACHED));
            }
            Expr::GetAttr(attribute) => {
                self.expression(&attribute.expr)?;
                // All other names are keys, or attributes of objects.
                if attributes::is_known(attribute.name) {
                    self.add(Instruction::LoadConst(Value::from(attribute.name)));
                    self.apply(":attr", 2);
                } else {
                    self.add(Instruction::GetAttr(attribute.name));
                }
            }
            Expr::GetItem(item) => {
                self.expression(&item.expr)?;
                self.expression(&item.subscript_expr)?;
                self.apply("[]", 2);
            }
            Expr::Call(call) => self.call(call, None)?,
            Expr::List(list) => {
                self.all(&list.items)?;
                self.add(Instruction::BuildList(Some(list.items.len())));
                self.apply(":walk", 1);
            }
            Expr::Tuple(tuple) => {
                self.all(&tuple.items)?;
                self.add(Instruction::BuildTuple(Some(tuple.items.len())));
                self.apply(":walk", 1);
            }
            Expr::Map(map) => {
                for (key, value) in map.keys.iter().zip(&map.values) {
                    self.expression(key)?;
                    self.apply(":key", 1);
                    self.expression(value)?;
                }
                self.add(Instruction::BuildMap(map.keys.len()));
                self.apply(":walk", 1);
                self.apply(":keys", 1);
            }
        }
        Ok(())
    }

    fn all(&mut self, expressions: &[Expr<'a>]) -> Outcome {
        expressions.iter().try_for_each(|expression| self.expression(expression))
    }

    /// `a < b == c`: `a < b and b == c` with `b` computed once.
    fn chain(&mut self, chain: &Spanned<Compare<'a>>) -> Outcome {
        self.expression(&chain.expr)?;
        let mut jumps = Vec::new();
        for (index, comparison) in chain.ops.iter().enumerate() {
            self.expression(&comparison.expr)?;
            let is_last = index + 1 == chain.ops.len();
            let (filter, followed) = match comparison.op {
                CompareOpKind::Eq => ("==", "==…"),
                CompareOpKind::Ne => ("!=", "!=…"),
                CompareOpKind::Lt => ("<", "<…"),
                CompareOpKind::Lte => ("<=", "<=…"),
                CompareOpKind::Gt => (">", ">…"),
                CompareOpKind::Gte => (">=", ">=…"),
                CompareOpKind::In => (":in", ":in…"),
                CompareOpKind::NotIn => (":not_in", ":not_in…"),
            };
            if is_last {
                self.apply(filter, 2);
            } else {
                // A pair: the operand that the next comparison takes, below whether this one holds.
                self.apply(followed, 2);
                self.add(Instruction::UnpackList(2));
                jumps.push(self.add(Instruction::JumpIfFalseOrPop(UNKNOWN)));
            }
        }
        let end = self.add(Instruction::Jump(UNKNOWN));
        for jump in jumps {
            self.land(jump);
        }
        // One did not hold: the operand goes.
        self.add(Instruction::Swap);
        self.add(Instruction::DiscardTop);
        self.land(end);
        Ok(())
    }

    /// A call; `caller` is the macro that a call block passes on.
    pub(super) fn call(&mut self, call: &Spanned<Call<'a>>, caller: Option<&Spanned<Macro<'a>>>) -> Outcome {
        let outer = std::mem::replace(&mut self.span, call.span());
        match call.identify_call() {
            CallType::Function(name) => {
                let count = self.arguments(&call.args, 0, caller)?;
                if name == "loop" && count == Some(1) {
                    self.apply(":iter", 1);
                }
                self.add(Instruction::CallFunction(name, count));
            }
            CallType::Block(name) => {
                self.add(self.begin_capture.clone());
                self.add(Instruction::CallBlock(name));
                self.add(Instruction::EndCapture);
            }
            CallType::Method(object, name) => {
                self.expression(object)?;
                let count = self.arguments(&call.args, 1, caller)?;
                // minijinja's loops divide by the number of arguments.
                if name == "cycle" && count == Some(1) {
                    self.apply(":cycle", 1);
                }
                // Its loops compare with what they were called with before.
                if name == "changed" {
                    self.apply(":walk", 1);
                }
                self.add(Instruction::CallMethod(name, count));
            }
            CallType::Object(object) => {
                self.expression(object)?;
                let count = self.arguments(&call.args, 1, caller)?;
                self.add(Instruction::CallObject(count));
            }
        }
        self.span = outer;
        Ok(())
    }

    /// Leaves arguments on the stack, after `before` that lie there already. Returns how many there are in
    /// all, if that is known before the program runs.
    fn arguments(
        &mut self,
        arguments: &[CallArg<'a>],
        before: usize,
        caller: Option<&Spanned<Macro<'a>>>,
    ) -> Result<Option<u16>, Error> {
        self.check_order(arguments)?;
        let mut pending = before;
        // Lists of arguments, which are joined at the end; there are none without a star.
        let mut lists = 0;
        for argument in arguments {
            match argument {
                CallArg::Pos(expression) => {
                    self.expression(expression)?;
                    pending += 1;
                }
                CallArg::PosSplat(expression) => {
                    if pending > 0 {
                        self.add(Instruction::BuildList(Some(pending)));
                        lists += 1;
                    }
                    pending = 0;
                    self.expression(expression)?;
                    self.apply(":iter", 1);
                    lists += 1;
                }
                CallArg::Kwarg(..) | CallArg::KwargSplat(_) => {}
            }
        }
        if self.keywords(arguments, caller)? {
            pending += 1;
        }
        if lists == 0 {
            return u16::try_from(pending).map(Some).map_err(|_| self.fail("too many arguments"));
        }
        if pending > 0 {
            self.add(Instruction::BuildList(Some(pending)));
            lists += 1;
        }
        self.add(Instruction::UnpackLists(lists));
        Ok(None)
    }

    /// Checks that one star comes after all places and two stars after everything.
    fn check_order(&self, arguments: &[CallArg<'a>]) -> Outcome {
        let (mut has_star, mut has_two) = (false, false);
        for argument in arguments {
            if has_two || (has_star && matches!(argument, CallArg::Pos(_) | CallArg::PosSplat(_))) {
                return Err(self.fail("an argument after those of a star"));
            }
            has_star |= matches!(argument, CallArg::PosSplat(_));
            has_two |= matches!(argument, CallArg::KwargSplat(_));
        }
        Ok(())
    }

    /// Leaves keyword arguments on the stack as one value, if there are any.
    fn keywords(
        &mut self,
        arguments: &[CallArg<'a>],
        caller: Option<&Spanned<Macro<'a>>>,
    ) -> Result<bool, Error> {
        let mut pending = 0;
        let mut names = BTreeSet::new();
        for argument in arguments {
            let CallArg::Kwarg(name, expression) = argument else { continue };
            self.add(Instruction::LoadConst(Value::from(*name)));
            self.expression(expression)?;
            pending += 1;
            if !names.insert(*name) {
                return Err(self.fail(&format!("the argument {name:?} is given twice")));
            }
        }
        if let Some(caller) = caller {
            self.add(Instruction::LoadConst(Value::from("caller")));
            self.macro_value(caller, None)?;
            pending += 1;
            if !names.insert("caller") {
                return Err(self.fail("the argument \"caller\" is given twice"));
            }
        }
        if let Some(CallArg::KwargSplat(expression)) = arguments.last() {
            self.add(Instruction::BuildMap(pending));
            self.expression(expression)?;
            self.apply(":merge", 2);
            return Ok(true);
        }
        if pending > 0 {
            self.add(Instruction::BuildKwargs(pending));
        }
        Ok(pending > 0)
    }
}

/// Whether an expression is written out, without a name in it.
fn is_constant(expression: &Expr<'_>) -> bool {
    let all = |expressions: &[Expr<'_>]| expressions.iter().all(is_constant);
    match expression {
        Expr::Const(_) => true,
        Expr::List(list) => all(&list.items),
        Expr::Tuple(tuple) => all(&tuple.items),
        Expr::Map(map) => all(&map.keys) && all(&map.values),
        Expr::Slice(slice) => {
            let bounds = [&slice.start, &slice.stop, &slice.step];
            is_constant(&slice.expr) && bounds.into_iter().flatten().all(is_constant)
        }
        _ => false,
    }
}

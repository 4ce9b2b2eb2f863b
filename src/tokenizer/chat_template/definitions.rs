//! Macros, and what call blocks pass on, to instructions.

use std::collections::BTreeSet;

use minijinja::Value;
use minijinja::machinery::Instruction;
use minijinja::machinery::ast::{Expr, Macro, Spanned};

use super::compiler::{Compiler, Outcome, UNKNOWN};
use super::macros::{MISSING, Signature};

/// What a macro has beside its parameters, if its body names it.
pub(super) const SPECIAL: [&str; 3] = ["caller", "kwargs", "varargs"];

impl<'a> Compiler<'a> {
    /// Leaves a macro on the stack; one without a name is a call block's.
    pub(super) fn macro_value(&mut self, definition: &Spanned<Macro<'a>>, name: Option<&'a str>) -> Outcome {
        self.span = definition.span();
        let (mut parameters, mut known) = (Vec::new(), BTreeSet::new());
        for argument in &definition.args {
            match argument {
                Expr::Var(variable) if known.insert(variable.id) => parameters.push(variable.id),
                _ => return Err(self.fail("a macro's parameters must be different names")),
            }
        }
        let outer = std::mem::take(&mut self.open);
        let over = self.add(Instruction::Jump(UNKNOWN));
        // Never run: a macro around this one takes these names for its own no more.
        for name in parameters.iter().filter(|name| SPECIAL.contains(name)) {
            self.add(Instruction::StoreLocal(name));
        }
        let body = self.next();
        self.scope(&definition.body)?;
        self.add(Instruction::Return);
        self.span = definition.span();
        // The arguments are taken behind the body, which tells what it takes.
        let special = self.special_names(body);
        let start = self.next();
        // Defaults belong to the last parameters.
        let first_default = parameters.len().saturating_sub(definition.defaults.len());
        if special.contains(&"caller") && parameters.iter().take(first_default).any(|name| *name == "caller")
        {
            return Err(self.fail("the parameter caller needs a default"));
        }
        let hidden: Vec<&str> = special.iter().filter(|name| !known.contains(*name)).copied().collect();
        let all: Vec<&str> = parameters.iter().chain(&hidden).chain(&[MISSING]).copied().collect();
        known.extend(&all);
        for name in all.iter().rev() {
            self.add(Instruction::StoreLocal(name));
        }
        // Each default may name the parameters before it.
        for (index, default) in (first_default..).zip(&definition.defaults) {
            self.add(Instruction::Lookup(MISSING));
            self.add(Instruction::LoadConst(Value::from(index)));
            self.add(Instruction::GetItem);
            let given = self.add(Instruction::JumpIfFalse(UNKNOWN));
            self.expression(default)?;
            if let Some(name) = parameters.get(index) {
                self.add(Instruction::StoreLocal(name));
            }
            self.land(given);
        }
        self.add(Instruction::Jump(body));
        let end = self.next();
        self.land(over);
        self.open = outer;
        // What is assigned in the macro is found there first, so it does no harm among the names of outside.
        let mut used = BTreeSet::new();
        for index in body..end {
            if let Some(Instruction::Lookup(name) | Instruction::CallFunction(name, _)) =
                self.program.get(index)
            {
                used.insert(*name);
            }
        }
        for name in used.into_iter().filter(|name| !known.contains(name)) {
            self.add(Instruction::Enclose(name));
        }
        self.add(Instruction::GetClosure);
        self.add(Instruction::LoadConst(all.iter().map(|name| Value::from(*name)).collect()));
        self.add(Instruction::BuildMacro(definition.name, start, 0));
        self.add(Instruction::LoadConst(Value::from_object(Signature {
            name: name.map(str::to_owned),
            takes_caller: special.contains(&"caller"),
            takes_kwargs: hidden.contains(&"kwargs"),
            takes_varargs: hidden.contains(&"varargs"),
            parameters: parameters.into_iter().map(str::to_owned).collect(),
        })));
        self.apply(":macro", 2);
        Ok(())
    }

    /// Which of the names that Jinja gives a value in every macro the body from `start` on looks up, in the
    /// order in which they follow the parameters. One that the body has assigned before is the template's own.
    fn special_names(&self, start: u32) -> Vec<&'static str> {
        let mut special: Vec<(&str, bool)> = SPECIAL.map(|name| (name, false)).to_vec();
        for index in start..self.next() {
            match self.program.get(index) {
                Some(Instruction::Lookup(name) | Instruction::CallFunction(name, _)) => {
                    special.iter_mut().filter(|(known, _)| known == name).for_each(|(_, used)| *used = true);
                }
                Some(Instruction::StoreLocal(name)) => {
                    special.retain(|(known, is_used)| known != name || *is_used);
                }
                _ => {}
            }
        }
        special.into_iter().filter(|(_, is_used)| *is_used).map(|(name, _)| name).collect()
    }
}

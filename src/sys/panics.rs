//! Remembers where panics happened, for the error that they become.

use super::sync::Mutex;
use std::any::Any;

/// The last panic's message and source location.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Sets a panic hook that keeps the message and source location instead of printing them.
pub fn remember() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|place| format!(" at {place}")).unwrap_or_default();
        *LAST.lock() = format!("{}{place}", message(info.payload()));
    }));
}

/// What is known of a caught panic. Its thread may not be the one that panicked first.
pub fn describe(payload: &(dyn Any + Send)) -> String {
    let (last, message) = (LAST.lock().clone(), message(payload));
    if last.starts_with(message) { last } else { message.to_owned() }
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic")
}

//! `forward`: names that are not ours are an upstream's.
//!
//! **Promise.** What no other plugin knows is asked of the configured upstreams, and refused where
//! there is none. How they are asked is [`crate::io`]'s: this says only that they are.

use crate::chain::{Context, Plugin, Step};
use crate::wire::Question;

/// The plugin.
pub const PLUGIN: Plugin = Plugin { name: "forward", answer };

fn answer(_question: &Question, context: &Context<'_>) -> Step {
    if context.settings.upstreams.is_empty() { Step::Refuse } else { Step::Forward }
}

//! What this node's speed was lately, for its load reports.
//!
//! Invariant: rates are measured, never configured, and never negative. 0 means not measured yet.
//! Pure: durations come from the caller.

/// Weight of the newest measurement: some twenty of them make the mean.
const SMOOTHING: f64 = 0.05;

/// A smoothed mean that starts with its first value.
#[derive(Debug, Default, Clone, Copy)]
pub struct Smoothed(Option<f64>);

impl Smoothed {
    /// Takes a value in. What is no finite number is left out.
    pub fn observe(&mut self, value: f64) {
        if value.is_finite() {
            let mean = self.0.unwrap_or(value);
            self.0 = Some(mean + (value - mean) * SMOOTHING);
        }
    }

    /// The mean, or 0.
    pub fn get(self) -> f64 {
        self.0.unwrap_or(0.0)
    }
}

/// Fits `ms = a * tokens + b * tokens * context / 1000` to the steps that prefilled, by least squares in which
/// old steps fade.
#[derive(Debug, Default, Clone, Copy)]
pub struct PrefillRate {
    /// Sums of products: tokens², tokens * kilocontext, kilocontext², tokens * ms, kilocontext * ms.
    tt: f64,
    tc: f64,
    cc: f64,
    tm: f64,
    cm: f64,
}

impl PrefillRate {
    /// Takes a step in: its tokens, the sum over them of the thousands of tokens that each one attends to, and how
    /// long it took.
    pub fn observe(&mut self, tokens: f64, token_kilocontext: f64, ms: f64) {
        if !(tokens >= 1.0
            && (0.0..f64::INFINITY).contains(&token_kilocontext)
            && (0.0..f64::INFINITY).contains(&ms))
        {
            return;
        }
        // Divided by the tokens: otherwise long steps would count quadratically.
        let (t, c, m) = (1.0, token_kilocontext / tokens, ms / tokens);
        for (sum, product) in [
            (&mut self.tt, t * t),
            (&mut self.tc, t * c),
            (&mut self.cc, c * c),
            (&mut self.tm, t * m),
            (&mut self.cm, c * m),
        ] {
            *sum = *sum * (1.0 - SMOOTHING) + product;
        }
    }

    /// Milliseconds per token without context, and per token and thousand tokens of context.
    pub fn get(&self) -> (f64, f64) {
        if self.tt == 0.0 {
            return (0.0, 0.0);
        }
        let determinant = self.tt * self.cc - self.tc * self.tc;
        // Steps of one context length tell nothing about the slope.
        let slope = if determinant > 1e-6 * self.tt * self.cc {
            (self.tt * self.cm - self.tc * self.tm) / determinant
        } else {
            0.0
        };
        let slope = slope.max(0.0);
        let base = (self.tm - slope * self.tc) / self.tt;
        if base > 0.0 {
            (base, slope)
        } else {
            // Noise: no token is free. 0 would also say that nothing was measured.
            (self.tm / self.tt, 0.0)
        }
    }
}

#[cfg(test)]
mod tests;

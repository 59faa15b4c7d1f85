//! Pages that show a forecast: one file, no script, nothing loaded from elsewhere.

mod svg;

pub use svg::{Bar, Curve, Lane, bars, curves, timeline};

/// A page of headed parts.
#[derive(Clone, Debug, Default)]
pub struct Page {
    title: String,
    body: String,
}

/// `text` with what HTML would read as its own replaced.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}\
    h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}\
    td{padding:.15rem 1rem .15rem 0;vertical-align:top}td+td{font-variant-numeric:tabular-nums}\
    svg{width:100%;height:auto;font:11px system-ui,sans-serif}p{color:#57606a}";

impl Page {
    /// An empty page.
    pub fn new(title: &str) -> Page {
        Page {
            title: title.into(),
            body: String::new(),
        }
    }

    /// A heading, a sentence, and a drawing of this module.
    pub fn figure(&mut self, heading: &str, says: &str, svg: &str) {
        self.body += &format!(
            "<h2>{}</h2>\n<p>{}</p>\n{svg}\n",
            escape(heading),
            escape(says)
        );
    }

    /// A heading and a table of names and values.
    pub fn table(&mut self, heading: &str, rows: &[(String, String)]) {
        self.body += &format!("<h2>{}</h2>\n<table>\n", escape(heading));
        for (name, value) in rows {
            self.body += &format!(
                "<tr><td>{}</td><td>{}</td></tr>\n",
                escape(name),
                escape(value)
            );
        }
        self.body += "</table>\n";
    }

    /// The page's text.
    pub fn render(&self) -> String {
        let title = escape(&self.title);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n<style>{STYLE}</style>\n\
             </head>\n<body>\n<h1>{title}</h1>\n{}</body>\n</html>\n",
            self.body
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_loads_nothing_and_closes_what_it_opens() {
        let mut page = Page::new("a <model> & \"more\"");
        page.table("sizes", &[("layers".into(), "3 < 4".into())]);
        let lane = Lane {
            name: "stage 0".into(),
            spans: vec![(0.0, 1.0, 0, "forward 0".into())],
        };
        page.figure("timeline", "what ran", &timeline(&[lane], &["forward"]));
        let bar = Bar {
            name: "matmul".into(),
            value: 2.0,
            label: "2 s".into(),
        };
        page.figure("breakdown", "where it goes", &bars(&[bar]));
        let curve = Curve {
            name: "strong".into(),
            points: vec![(1.0, 1.0), (8.0, 7.0)],
        };
        page.figure(
            "scaling",
            "more chips",
            &curves(&[curve], "chips", "tokens/s"),
        );
        let text = page.render();
        for word in ["http", "<script", "src=", "NaN", "<model>"] {
            assert!(!text.contains(word), "{word} in the page");
        }
        for tag in ["svg", "table", "body", "html", "style", "h2"] {
            let count = |mark: &str| text.matches(mark).count();
            let open = count(&format!("<{tag}>")) + count(&format!("<{tag} "));
            assert_eq!(open, count(&format!("</{tag}>")), "{tag}");
        }
    }
}

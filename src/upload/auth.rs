//! Access tokens by Google's usual order: GOOGLE_APPLICATION_CREDENTIALS, gcloud's own file, the metadata server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use gcp_bigquery_client::auth::Authenticator;
use gcp_bigquery_client::error::BQError;
use gcp_bigquery_client::yup_oauth2::authenticator::{
    ApplicationDefaultCredentialsTypes, Authenticator as Google, DefaultAuthenticator, ExternalAccountAuthenticator,
    ServiceAccountImpersonationAuthenticator,
};
use gcp_bigquery_client::yup_oauth2::{self as oauth2, ApplicationDefaultCredentialsFlowOpts};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// What falaj asks Google for.
const SCOPES: [&str; 1] = ["https://www.googleapis.com/auth/bigquery"];
/// Where gcloud keeps the application default credentials, under its configuration directory.
const WELL_KNOWN: &str = "application_default_credentials.json";
const FIX: &str = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file";

/// How requests are authorised. Cheap to clone.
#[derive(Clone)]
pub enum Credentials {
    /// Not at all: a local server.
    None,
    /// By tokens from Google, kept and renewed by yup-oauth2.
    Google(Arc<Tokens>),
}

/// Tokens from one source of credentials.
pub struct Tokens {
    source: String,
    google: DefaultAuthenticator,
    worked: AtomicBool,
}

impl Credentials {
    /// Finds the credentials; no token is asked for yet.
    ///
    /// # Errors
    /// [`Error::Refused`] with the file that cannot be used.
    pub async fn find() -> Result<Self> {
        let (source, google) = match credentials_file() {
            Some(path) => (path.display().to_string(), from_file(&path).await?),
            None => ("the metadata server".to_owned(), from_metadata_server().await?),
        };
        Ok(Self::Google(Arc::new(Tokens { source, google, worked: AtomicBool::new(false) })))
    }

    /// A token for the `Authorization` header; `None` where none is needed.
    ///
    /// # Errors
    /// [`Error::Refused`] when Google says no, or when the machine has no credentials at all; else [`Error::Unreachable`].
    pub async fn token(&self) -> Result<Option<String>> {
        match self {
            Self::None => Ok(None),
            Self::Google(tokens) => tokens.fresh().await.map(Some),
        }
    }
}

impl Tokens {
    async fn fresh(&self) -> Result<String> {
        let token = self.google.token(&SCOPES).await.map_err(|e| self.sort(e))?;
        let text = token.token().ok_or_else(|| refused(&self.source, "it gave no access token"))?.to_owned();
        self.worked.store(true, Ordering::Relaxed);
        Ok(text)
    }

    /// A machine that never had a token and finds no file is not set up; one that had is cut off for a while.
    fn sort(&self, e: oauth2::Error) -> Error {
        use oauth2::Error as E;
        let from_file = self.source != "the metadata server";
        match e {
            E::HttpError(_) | E::HttpClientError(_) | E::LowLevelError(_)
                if from_file || self.worked.load(Ordering::Relaxed) =>
            {
                Error::unreachable("Google's token service", e)
            }
            other => refused(&self.source, &other.to_string()),
        }
    }
}

#[async_trait]
impl Authenticator for Credentials {
    async fn access_token(&self) -> Result<String, BQError> {
        match self {
            // The client always sends a token; a local server does not look at it.
            Self::None => Ok("none".to_owned()),
            Self::Google(tokens) => {
                let token = tokens.google.token(&SCOPES).await?;
                token.token().map(str::to_owned).ok_or(BQError::NoToken)
            }
        }
    }
}

fn credentials_file() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("GOOGLE_APPLICATION_CREDENTIALS").filter(|p| !p.is_empty()) {
        return Some(path.into());
    }
    let directory = match std::env::var_os("CLOUDSDK_CONFIG").filter(|p| !p.is_empty()) {
        Some(directory) => PathBuf::from(directory),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".config/gcloud"),
    };
    Some(directory.join(WELL_KNOWN)).filter(|path| path.exists())
}

async fn from_metadata_server() -> Result<DefaultAuthenticator> {
    let options = ApplicationDefaultCredentialsFlowOpts::default();
    let built = match oauth2::ApplicationDefaultCredentialsAuthenticator::builder(options).await {
        ApplicationDefaultCredentialsTypes::InstanceMetadata(builder) => builder.build().await,
        ApplicationDefaultCredentialsTypes::ServiceAccount(builder) => builder.build().await,
    };
    built.map_err(|e| refused("the metadata server", &e.to_string()))
}

async fn from_file(path: &Path) -> Result<DefaultAuthenticator> {
    let bad = |why: String| refused(&path.display().to_string(), &why);
    let text = tokio::fs::read_to_string(path).await.map_err(|e| bad(e.to_string()))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    let built: std::io::Result<Google<_>> = match json["type"].as_str() {
        Some("service_account") => oauth2::ServiceAccountAuthenticator::builder(part(&json, path)?).build().await,
        Some("authorized_user") => {
            oauth2::authenticator::AuthorizedUserAuthenticator::builder(part(&json, path)?).build().await
        }
        Some("external_account") => ExternalAccountAuthenticator::builder(part(&json, path)?).build().await,
        Some("impersonated_service_account") => {
            let account = impersonated(&json).ok_or_else(|| bad("it names no service account".into()))?;
            let user = part(&json["source_credentials"], path)?;
            ServiceAccountImpersonationAuthenticator::builder(user, account).build().await
        }
        other => return Err(bad(format!("its type is {}", other.unwrap_or("missing")))),
    };
    built.map_err(|e| bad(e.to_string()))
}

fn part<T: DeserializeOwned>(json: &serde_json::Value, path: &Path) -> Result<T> {
    T::deserialize(json).map_err(|e| refused(&path.display().to_string(), &e.to_string()))
}

/// The account in `…/serviceAccounts/{account}:generateAccessToken`.
fn impersonated(json: &serde_json::Value) -> Option<&str> {
    let url = json["service_account_impersonation_url"].as_str()?;
    url.rsplit_once('/')?.1.strip_suffix(":generateAccessToken")
}

fn refused(source: &str, why: &str) -> Error {
    Error::refused(
        "bigquery_credentials",
        format!("{source}: {why}"),
        "Google credentials: a service account key, a user's login, or a machine that has a service account",
        FIX,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_cannot_be_used_is_refused_with_its_name() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        for (text, why) in [
            ("{}", "its type is missing"),
            (r#"{"type":"gdch_service_account"}"#, "its type is gdch_service_account"),
            (r#"{"type":"authorized_user"}"#, "missing field `client_id`"),
        ] {
            let path = dir.path().join("key.json");
            std::fs::write(&path, text).unwrap();
            let error = from_file(&path).await.err().unwrap();
            assert_eq!(error.exit_code(), 78);
            assert!(error.to_string().contains(&format!("{}: {why}", path.display())), "{error}");
        }
    }

    #[tokio::test]
    async fn a_users_login_is_taken() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adc.json");
        std::fs::write(&path, r#"{"type":"authorized_user","client_id":"i","client_secret":"s","refresh_token":"r"}"#)
            .unwrap();
        assert!(from_file(&path).await.is_ok());
    }
}

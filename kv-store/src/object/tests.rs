//! Opening a tier.

use rstest::rstest;

use super::*;

fn open(url: &str) -> Result<Objects, OpenError> {
    let config = Config {
        url: url.to_owned(),
        bounds: Bounds::default(),
    };
    let checked = config.check_url();
    let opened = Objects::open(&config, BlockHash([7; 16]), 512);
    if let Err(OpenError::Url { .. }) = opened {
        assert!(checked.is_err());
    } else {
        assert_eq!(checked, Ok(()));
    }
    opened
}

#[rstest]
#[case("")]
#[case("/var/lib")]
#[case("file://folder")]
#[case("s3://")]
#[case("s3:///prefix")]
#[case("gs://bucket")]
fn what_is_no_place_for_objects_is_refused_by_name(#[case] url: &str) {
    let error = open(url).err().expect("it is refused");
    assert_eq!(error, OpenError::Url { url: url.to_owned() });
    assert_eq!(error.code(), ErrorCode::Invalid);
    assert!(error.to_string().contains("s3://bucket/prefix"));
}

#[tokio::test]
async fn a_folder_is_made_and_keeps_what_is_put_there() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}/a/b", folder.path().display());
    let objects = open(&url).unwrap();
    let name = BlockHash([0xab; 16]);
    let bytes = vec![5; objects.grid().object_bytes() as usize];
    assert_eq!(objects.get(name).await.unwrap(), None);
    assert!(!objects.contains(name).await.unwrap());
    objects.put(name, vec![bytes.clone().into()]).await.unwrap();
    assert!(objects.contains(name).await.unwrap());
    assert_eq!(open(&url).unwrap().get(name).await.unwrap().unwrap(), bytes);
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let url = format!("file://{}/folder", file.path().display());
    let error = open(&url).err().expect("it is refused");
    assert!(error.to_string().contains(&url), "{error}");
}

/// Needs neither network nor credentials: both are asked for with the first request.
#[test]
fn a_bucket_opens_without_being_asked_for_anything() {
    assert!(open("s3://bucket/some/prefix").unwrap().is_usable());
}

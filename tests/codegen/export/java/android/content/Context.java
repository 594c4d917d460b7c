package android.content;

import android.content.res.AssetManager;
import java.io.File;

/** What an export's classes use of Android's Context, for a folder. */
public final class Context {
  private final File folder;

  public Context(File folder) {
    this.folder = folder;
  }

  public File getNoBackupFilesDir() {
    File files = new File(folder, "files");
    files.mkdirs();
    return files;
  }

  public AssetManager getAssets() {
    return new AssetManager(new File(folder, "assets"));
  }
}
